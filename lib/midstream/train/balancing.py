"""Where a mixture of experts sends its tokens, and two ways of keeping the loads even: a bias, or a loss.

Works on the routers of transformers' own classes, in two kinds: those of the DeepSeek-V3 line (sigmoid scores and a
bias buffer for the selection) and those of Mixtral, OLMoE, Qwen2-MoE and their kin (softmax scores, no bias).

Reference of the bias: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
arXiv 2408.15664. In symbols: s scores (tokens, experts), c loads (routers, experts), b bias (routers, experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BIAS = "e_score_correction_bias"
"""What transformers calls the selection bias of DeepSeek-V3's routers."""


Output = tuple[Tensor, Tensor, Tensor]
"""What a router returns: logits (tokens, experts), gate values and chosen experts (tokens, k)."""


@dataclass(frozen=True)
class Routed:
    """What one router did in one forward."""

    scores: Tensor
    """s, (tokens, experts), with its gradient: what the router thinks of each expert, without any bias."""
    chosen: Tensor
    """(tokens, k): the experts that each token goes to."""


def routers(model: nn.Module) -> dict[str, Any]:
    """The top-k routers of a model by name, in order. Raises `ValueError` where there is none."""
    found = {name: module for name, module in model.named_modules() if _is_router(module)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no top-k router of the kinds known here: is it a mixture?")
    return found


def _is_router(module: nn.Module) -> bool:
    weight, experts = getattr(module, "weight", None), getattr(module, "num_experts", None)
    is_matrix = isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] == experts
    return is_matrix and isinstance(getattr(module, "top_k", None), int)


def scores_of(router: Any, logits: Tensor) -> Tensor:
    """s of a router's logits, both (tokens, experts): a sigmoid in the DeepSeek-V3 line, else a softmax."""
    logits = logits.float()
    return logits.sigmoid() if hasattr(router, BIAS) else logits.softmax(-1)


def select(router: Any, scores: Tensor, preferences: Tensor) -> tuple[Tensor, Tensor]:
    """Gate values and experts, both (tokens, k): the top k of `preferences`, weighted by the unbiased `scores`."""
    chosen = preferences.topk(router.top_k, dim=-1, sorted=False).indices
    gates = scores.gather(1, chosen)
    if getattr(router, "norm_topk_prob", True):  # Mixtral always divides, and has no name for it
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return gates * getattr(router, "routed_scaling_factor", 1.0), chosen


@contextmanager
def routing(model: nn.Module) -> Iterator[list[Routed]]:
    """A list to which every forward adds one `Routed` a router, in order; clear it between forwards.

    Open it after a `LossFreeBalancing` of the same model, whose choice it then sees.
    """
    seen: list[Routed] = []

    def note(router: Any, _: Any, output: Output) -> None:
        seen.append(Routed(scores_of(router, output[0]), output[2]))

    with ExitStack() as hooks:
        for router in routers(model).values():
            hooks.callback(router.register_forward_hook(note).remove)
        yield seen


def load(chosen: Tensor, experts: int) -> Tensor:
    """c: how many tokens go to each expert, (experts,), of the experts chosen by each token (tokens, k)."""
    return chosen.flatten().bincount(minlength=experts)


def max_violation(loads: Tensor) -> Tensor:
    """MaxVio = (max_i c_i − mean c) / mean c, over the last axis: 0 is even, (experts / k) − 1 is collapse."""
    mean = loads.float().mean(-1)
    return (loads.amax(-1) - mean) / mean


def balance_loss(routed: Sequence[Routed]) -> Tensor:
    """Σ over routers and experts of f_i P_i, the auxiliary loss before its weight α; 1 a router when all is even.

    f_i = c_i · N / (K·T) is an expert's relative load, a constant for the gradient; P_i the mean over tokens of its
    share of the token's scores.
    """
    total = torch.zeros((), device=routed[0].scores.device)
    for each in routed:
        experts = each.scores.shape[-1]
        relative = load(each.chosen, experts) * experts / each.chosen.numel()  # f
        shares = each.scores / each.scores.sum(-1, keepdim=True)
        total = total + (relative * shares.mean(0)).sum()
    return total


# ------------------------------------------------------------------------------------------- balancing by a bias


@dataclass(frozen=True)
class Rule:
    """How the errors of the loads change the bias, and how the bias changes what is selected."""

    direction: Callable[[Tensor], Tensor]
    """From the errors, mean(c) − c, as a share of the mean load (routers, experts), to the change of b before u."""
    combine: Callable[[Tensor, Tensor], Tensor] = torch.add
    """Scores and bias → preferences."""
    start: float = 0.0


RULES = {
    "sign": Rule(torch.sign),
    "proportional": Rule(lambda errors: errors),
    "multiplicative": Rule(torch.sign, torch.mul, 1.0),
    "misdirected": Rule(lambda errors: errors.roll(1, -1).sign()),
}
"""`sign` is the paper's. `misdirected` gives each expert its neighbour's error: a control that cannot balance."""


class LossFreeBalancing(AbstractContextManager["LossFreeBalancing"]):
    """Keeps the experts' loads even by a bias on the selection, b ← b + u·sign(mean(c) − c) after each batch.

    Open it around the training and hand `update` to the loop as what follows a step; forwards in eval mode are not
    counted. `rate` is u; at 0 loads are only counted. A DeepSeek-V3 router's own bias buffer is used where the rule
    adds, so that the trained model carries it; other routers are given one for as long as this is open. Every token of
    a batch counts, padding too: train on packed sequences.
    """

    def __init__(self, model: nn.Module, rate: float, rule: str = "sign"):
        self.rate, self.rule = rate, RULES[rule]
        self.routers = routers(model)
        self.counts = [torch.zeros(router.num_experts, dtype=torch.long) for router in self.routers.values()]
        self.given = [self._bias_to_give(router) for router in self.routers.values()]
        self.hooks = ExitStack()

    def _bias_to_give(self, router: Any) -> Tensor | None:
        """A bias for a router that has none of its own, or none that the rule can use."""
        if hasattr(router, BIAS) and self.rule.combine is torch.add:
            return None
        if getattr(router, "num_group", 1) != 1:
            raise ValueError("Only a bias that is added knows groups of experts: use another rule, or n_group=1.")
        return torch.full((router.num_experts,), self.rule.start)

    def __enter__(self) -> LossFreeBalancing:
        for index, router in enumerate(self.routers.values()):
            if self.given[index] is not None:
                self.hooks.callback(router.register_forward_hook(self._selecting(index)).remove)
            self.hooks.callback(router.register_forward_hook(self._counting(index)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    def _selecting(self, index: int) -> Callable[[Any, Any, Output], Output]:
        def hook(router: Any, _: Any, output: Output) -> Output:
            logits, gates, _ = output
            scores = scores_of(router, logits)
            new_gates, chosen = select(router, scores, self.rule.combine(scores, self._bias(index)))
            return logits, new_gates.to(gates.dtype), chosen

        return hook

    def _counting(self, index: int) -> Callable[[Any, Any, Output], None]:
        def hook(router: Any, _: Any, output: Output) -> None:
            if router.training:
                counts = load(output[2], router.num_experts)
                self.counts[index] = self.counts[index].to(counts.device) + counts

        return hook

    def _bias(self, index: int) -> Tensor:
        """The bias of one router, on that router's device, which may have changed since the last call."""
        router, given = list(self.routers.values())[index], self.given[index]
        if given is None:
            return router.get_buffer(BIAS)
        given = self.given[index] = given.to(router.weight.device)
        return given

    def biases(self) -> Tensor:
        """b as it stands, (routers, experts), a copy on the CPU."""
        return torch.stack([self._bias(index).detach().cpu() for index in range(len(self.counts))])

    @torch.no_grad()
    def update(self) -> Tensor:
        """Moves the bias by the loads since the last update, summed over all processes.

        Returns these loads, (routers, experts), on the CPU.
        """
        loads = torch.stack([_over_processes(counts).cpu() for counts in self.counts])  # (routers, experts)
        mean = loads.double().mean(-1, keepdim=True)
        for index, change in enumerate(self.rule.direction((mean - loads) / mean.clamp(min=1))):
            bias = self._bias(index)
            bias += self.rate * change.to(bias)
            self.counts[index].zero_()
        return loads


def _over_processes(counts: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


# ------------------------------------------------------------------------------------------------- expert choice


def expert_choice(scores: Tensor, capacity: int) -> Tensor:
    """Routing the other way round: each expert takes its `capacity` best tokens; (tokens, experts) of booleans.

    Loads are even by construction, but whether a token is taken depends on all tokens, later ones included.
    """
    taken = torch.zeros_like(scores, dtype=torch.bool)
    return taken.scatter(0, scores.topk(capacity, dim=0).indices, True)

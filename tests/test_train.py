"""Facts of the shared training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from midstream.train import Schedule, fit


def line(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def batches(number: int | None = None) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(0)
    while number is None or number > 0:
        yield torch.randn(8, 3, generator=random)
        number = None if number is None else number - 1


def squared(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs).squeeze(-1) - inputs.sum(-1)).square().mean()


# ---------------------------------------------------------------- schedule


def test_the_rate_rises_in_a_line_to_the_peak_and_falls_as_half_a_cosine_to_the_floor() -> None:
    schedule = Schedule(steps=100, warmup=0.1, floor=0.2)
    shares = [schedule.share(step) for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == 1
    assert shares[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert schedule.share(100) == pytest.approx(0.2)


def test_a_floor_of_one_keeps_the_rate_after_the_warm_up() -> None:
    schedule = Schedule(steps=20, warmup=0.25, floor=1)
    assert [schedule.share(step) for step in range(5, 20)] == [1] * 15


def test_the_table_has_the_rate_of_every_step() -> None:
    schedule = Schedule(steps=6, learning_rate=0.5, warmup=0.5)
    table = fit(line(), batches(), squared, schedule)
    assert list(table["step"]) == [1, 2, 3, 4, 5, 6]
    assert list(table["learning_rate"]) == pytest.approx([0.5 * schedule.share(step) for step in range(6)])
    assert table["seconds"].is_monotonic_increasing


# ---------------------------------------------------------------- loop


def test_it_learns_and_leaves_the_model_in_eval_mode_without_gradients() -> None:
    model = line()
    table = fit(model, batches(), squared, Schedule(steps=200, learning_rate=0.05))
    assert table["loss"].iloc[-1] < 0.01 * table["loss"].iloc[0]
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_gives_the_same_curve() -> None:
    first, again, other = (fit(line(seed), batches(), squared, Schedule(steps=5))["loss"] for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)


def test_one_step_is_that_of_adamw() -> None:
    ours, theirs, inputs = line(), line(), next(batches())
    optimizer = torch.optim.AdamW(
        [{"params": theirs.weight, "weight_decay": 0.1}, {"params": theirs.bias, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.98),
    )
    squared(theirs, inputs).backward()
    optimizer.step()
    schedule = Schedule(steps=1, learning_rate=0.01, weight_decay=0.1, clip=math.inf)
    fit(ours, [inputs], squared, schedule, cpu=True)
    torch.testing.assert_close(ours.weight.cpu(), theirs.weight)
    torch.testing.assert_close(ours.bias.cpu(), theirs.bias)


class Tied(nn.Module):
    """An embedding, a linear layer, and an output layer that shares the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner, self.outer = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.outer.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outer(self.inner(self.table(tokens)))


def test_muon_moves_the_weights_of_linear_layers_and_adamw_the_tables_and_vectors() -> None:
    ours, theirs = Tied(), Tied()
    tokens = torch.arange(5)
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon([theirs.inner.weight], **options)
    groups = [
        {"params": theirs.table.weight, "weight_decay": 0.1},
        {"params": theirs.inner.bias, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98))
    theirs(tokens).square().mean().backward()
    muon.step()
    adamw.step()
    schedule = Schedule(steps=1, learning_rate=0.01, muon=0.02, weight_decay=0.1, clip=math.inf)
    fit(ours, [tokens], lambda model, inputs: model(inputs).square().mean(), schedule, cpu=True)
    for name, expected in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), expected)


def test_both_rates_follow_the_schedule() -> None:
    rates: list[list[float]] = []
    step = torch.optim.Muon.step

    def spy(self: torch.optim.Muon, *arguments: object, **options: object) -> object:
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments, **options)  # type: ignore[arg-type]

    schedule = Schedule(steps=5, learning_rate=1.0, muon=0.5, warmup=0.4, clip=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Muon, "step", spy)
        fit(line(), batches(), squared, schedule)
    assert rates == [[pytest.approx(0.5 * schedule.share(number))] for number in range(5)]


def test_weight_decay_shrinks_matrices_and_never_vectors() -> None:
    model = line()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    schedule = Schedule(steps=1, learning_rate=0.1, weight_decay=1.0)
    fit(model, batches(), lambda model, inputs: 0 * model(inputs).sum(), schedule)
    torch.testing.assert_close(model.weight.cpu(), 0.9 * weight)
    torch.testing.assert_close(model.bias.cpu(), bias)


def test_gradients_are_clipped_to_the_norm_and_the_table_has_the_norm_before() -> None:
    norms: list[float] = []

    def clipped(clip: float) -> float:
        model = line()
        seen: list[Tensor] = []
        step = torch.optim.AdamW.step

        def spy(self: torch.optim.AdamW, *arguments: object, **options: object) -> object:
            seen.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
            return step(self, *arguments, **options)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            norms.append(fit(model, batches(), squared, Schedule(steps=1, clip=clip))["gradient_norm"].iloc[0])
        return float(seen[0].norm())

    assert clipped(0.01) == pytest.approx(0.01, rel=1e-3)
    assert clipped(math.inf) == pytest.approx(norms[1])
    assert norms[0] == norms[1] > 0.01


def test_gradients_that_the_model_carries_beforehand_do_not_count() -> None:
    clean, stained = line(), line()
    stained.weight.grad = torch.full_like(stained.weight, 100.0)
    fit(clean, batches(), squared, Schedule(steps=1))
    fit(stained, batches(), squared, Schedule(steps=1))
    assert torch.equal(clean.weight, stained.weight)


def test_what_is_frozen_stays_and_a_model_that_is_all_frozen_is_refused() -> None:
    model = line()
    model.weight.requires_grad_(False)
    before = model.weight.clone()
    fit(model, batches(), squared, Schedule(steps=2))
    assert torch.equal(model.weight.cpu(), before)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model.requires_grad_(False), batches(), squared, Schedule(steps=2))


def test_after_step_is_called_after_each_update_counted_from_one() -> None:
    model, steps, weights = line(), [], []

    def note(step: int) -> None:
        steps.append(step)
        weights.append(model.weight.detach().clone())

    fit(model, batches(), squared, Schedule(steps=3), after_step=note)
    assert steps == [1, 2, 3]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], model.weight)


def test_too_few_batches_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 steps were asked for, but the data gave 3 batches"):
        fit(line(), batches(3), squared, Schedule(steps=5))


def test_no_batch_more_is_drawn_than_there_are_steps() -> None:
    fit(line(), batches(3), squared, Schedule(steps=3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_touches_a_weight(bad: float) -> None:
    model = line()
    before = model.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="The loss of step 1 is"):
        fit(model, batches(), lambda model, inputs: model(inputs).mean() * bad, Schedule(steps=2))
    assert torch.equal(model.weight.cpu(), before)


def test_bfloat16_computes_the_loss_under_autocast_and_keeps_the_weights() -> None:
    kinds = []

    def loss(model: nn.Module, inputs: Tensor) -> Tensor:
        outputs = model(inputs)
        kinds.append(outputs.dtype)
        return outputs.float().square().mean()

    model = line()
    fit(model, batches(), loss, Schedule(steps=1), precision="bfloat16")
    assert kinds == [torch.bfloat16]
    assert model.weight.dtype == torch.float32

"""How likely a causal language model finds a text, token by token, also one that another model wrote."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def token_nll(loaded: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihoods (rows, text), in nats, of tokens after prompts (rows, prompt), without any mark."""
    ids = torch.cat([prompt, tokens], 1).to(loaded.model.device)
    logits = loaded.model(ids, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1].float()
    return -logits.log_softmax(-1).gather(2, ids[:, prompt.shape[1] :, None])[..., 0].cpu()


def other_nll(oracle: Any, prompt: str, text: str, tokens: int) -> float:
    """NLL in nats per *generator's* token of a text after a prompt, by a model with a tokenizer of its own.

    The text's whole NLL is divided by the generator's number of `tokens`: other tokens, same unit.
    """
    start, ids = (oracle.tokenizer(words).input_ids for words in (prompt, prompt + text))
    shared = next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), len(start))
    row = torch.tensor(ids)[None]
    return float(token_nll(oracle, row[:, :shared], row[:, shared:]).sum()) / tokens

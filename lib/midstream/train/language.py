"""Small language models from scratch: a byte-level tokenizer, a stream of tokens, random windows, validation loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

END = "<|end|>"
"""Stands after every document."""


def train_tokenizer(texts: Sequence[str], size: int) -> Any:
    """A byte-level BPE tokenizer of `size` tokens, made from `texts`; the same texts give the same tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def stream(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All documents as one row of tokens, (tokens,), with the end token after each."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return torch.tensor([token for document in encoded for token in (*document, tokenizer.eos_token_id)])


def random_windows(tokens: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of random windows of a stream, (batch, length); the seed fixes them all."""
    random = torch.Generator().manual_seed(seed)
    places = torch.arange(length)
    while True:
        starts = torch.randint(0, len(tokens) - length + 1, (batch, 1), generator=random)
        yield tokens[starts + places]


def even_windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """`count` windows spread evenly over a stream without overlap, (count, length)."""
    if count * length > len(tokens):
        raise ValueError(f"{count} windows of {length} tokens need {count * length}; the stream has {len(tokens)}.")
    starts = torch.arange(count) * (len(tokens) // count)
    return tokens[starts[:, None] + torch.arange(length)]


def next_token_loss(model: Any, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each next token in `windows` (batch, length), in nats."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, windows: Tensor, batch: int = 32) -> float:
    """`next_token_loss` over many windows (count, length), in eval mode."""
    was_training = model.training
    model.eval()
    parts = [part.to(model.device) for part in windows.split(batch)]
    total = sum(float(next_token_loss(model, part)) * len(part) for part in parts)
    model.train(was_training)
    return total / len(windows)


def small_mixture(
    *, vocabulary: int, width: int, layers: int, experts: int, top_k: int, shared: int, expert_width: int, window: int
) -> Any:
    """An untrained mixture of experts of DeepSeek-V3's own class, every layer a mixture, on a CPU's fast path.

    Latent attention with 4 heads; gate values are the plain scores, undivided, as in arXiv 2408.15664.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    head = width // 4
    config = DeepseekV3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=expert_width,
        num_hidden_layers=layers,
        first_k_dense_replace=0,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=width // 2,
        qk_rope_head_dim=head // 4 * 2,
        qk_nope_head_dim=head - head // 4 * 2,
        v_head_dim=head,
        n_routed_experts=experts,
        n_shared_experts=shared,
        num_experts_per_tok=top_k,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        num_mtp_layers=0,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = DeepseekV3ForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model

"""Tiny models of every supported family: the real classes, small configurations, seeded random weights.

They answer in milliseconds, need no files, and are what tests and dry runs use. Their weights are scaled up from the
usual initialisation so that every block visibly changes the residual stream.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from midstream.errors import RequestError

BLOCKS = 4
WIDTH = 32
WINDOW = 1024
"""Tokens that every tiny text model has positions for."""
_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
}
_GROUPED: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": WINDOW}
_VISION: dict[str, Any] = {**_TEXT, "image_size": 16, "patch_size": 4}
_IMAGE_TOKEN = 3  # the id that LLaVA's prompts carry once per image patch


def _gpt2(vocab_size: int) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=vocab_size,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=4,
        n_positions=WINDOW,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.GPT2LMHeadModel(config)


def _opt(vocab_size: int) -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        ffn_dim=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=WINDOW,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.OPTForCausalLM(config)


def _llama(vocab_size: int) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=vocab_size, **_GROUPED))


def _qwen2(vocab_size: int) -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, **_GROUPED))


def _qwen3(vocab_size: int) -> nn.Module:
    config = hf.Qwen3Config(vocab_size=vocab_size, head_dim=16, bos_token_id=1, eos_token_id=2, **_GROUPED)
    return hf.Qwen3ForCausalLM(config)


def _gemma3(vocab_size: int) -> nn.Module:
    config = hf.Gemma3TextConfig(
        vocab_size=vocab_size,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * (BLOCKS // 2),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **_GROUPED,
    )
    return hf.Gemma3ForCausalLM(config)


def _bert(vocab_size: int) -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=vocab_size, max_position_embeddings=WINDOW, **_TEXT))


def _roberta(vocab_size: int) -> nn.Module:
    config = hf.RobertaConfig(vocab_size=vocab_size, max_position_embeddings=WINDOW, type_vocab_size=1, **_TEXT)
    return hf.RobertaForMaskedLM(config)


def _xlm_roberta(vocab_size: int) -> nn.Module:
    config = hf.XLMRobertaConfig(vocab_size=vocab_size, max_position_embeddings=WINDOW, type_vocab_size=1, **_TEXT)
    return hf.XLMRobertaForMaskedLM(config)


def _t5(vocab_size: int) -> nn.Module:
    config = hf.T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=BLOCKS,
        num_decoder_layers=BLOCKS,
        num_heads=4,
    )
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config)


def _vit(vocab_size: int) -> nn.Module:
    config = hf.ViTConfig(**_VISION)
    config.num_labels = 10
    return hf.ViTForImageClassification(config)


def _clip_vision(vocab_size: int) -> nn.Module:
    return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(projection_dim=WIDTH, **_VISION))


def _clip_text(vocab_size: int) -> nn.Module:
    config = hf.CLIPTextConfig(
        vocab_size=vocab_size,
        projection_dim=WIDTH,
        max_position_embeddings=WINDOW,
        pad_token_id=0,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        **_TEXT,
    )
    return hf.CLIPTextModelWithProjection(config)


def _llava(vocab_size: int) -> nn.Module:
    """LLaVA-1.5's shape: a CLIP tower read at its last block but one, a projector, a Llama with grouped heads."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION),
        text_config=hf.LlamaConfig(vocab_size=vocab_size, **_GROUPED),
        image_token_index=_IMAGE_TOKEN,
        image_seq_length=16,
    )
    return hf.LlavaForConditionalGeneration(config)


def _dit(vocab_size: int) -> nn.Module:
    from diffusers import DiTTransformer2DModel  # slow to import, and needed by this family alone

    model: Any = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return model


_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "bert": _bert,
    "roberta": _roberta,
    "xlm_roberta": _xlm_roberta,
    "t5": _t5,
    "vit": _vit,
    "clip_vision": _clip_vision,
    "clip_text": _clip_text,
    "llava": _llava,
    "dit": _dit,
}
FAMILIES = tuple(_BUILDERS)


def build(family: str, seed: int = 0, vocab_size: int = 128) -> nn.Module:
    """A tiny random model of `family`, in eval mode: 4 blocks (per stack) of width 32, 4 heads.

    The same family, seed and vocabulary give the same weights; the global random state is left alone.
    Raises `RequestError` for a family that is not in `FAMILIES`.
    """
    if family not in _BUILDERS:
        raise RequestError(f"no tiny model of family '{family}'; there are: {', '.join(FAMILIES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[family](vocab_size)
        _spread(model)
    return model.eval()


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Redraw every weight: matrices keep their input's scale, biases and gains vary, so that no term is invisible."""
    unit_offset = model.__class__.__name__.startswith("Gemma")  # Gemma's norms multiply by 1 + weight
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        else:
            is_gain = name.endswith("weight") and not unit_offset
            parameter.normal_(float(is_gain), 0.1)


def inputs(model: nn.Module, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random forward arguments that fit `model`: token ids (batch, length) with a full mask, or pixels, or latents.

    Vision towers ignore `length`; T5 also gets `decoder_input_ids` (batch, length // 2 + 1); LLaVA's prompt starts with
    its 16 image tokens and then has `length` text tokens.
    """
    config: Any = model.config
    random = torch.Generator().manual_seed(seed)
    kind = getattr(config, "model_type", "dit")
    if kind == "dit":
        return _diffusion_inputs(batch, random)
    if kind in ("vit", "clip_vision_model"):
        return {"pixel_values": _pixels(config, batch, random)}
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(4, vocabulary - 2, (batch, length), generator=random)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "clip_text_model":
        ids[:, -1] = vocabulary - 1  # pooled at the end-of-text token
    if kind == "t5":
        arguments["decoder_input_ids"] = torch.randint(4, vocabulary, (batch, length // 2 + 1), generator=random)
    if kind == "llava":
        ids = torch.cat([torch.full((batch, 16), _IMAGE_TOKEN), ids], dim=1)
        pixels = _pixels(config.vision_config, batch, random)
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return arguments


def _pixels(config: Any, batch: int, random: torch.Generator) -> torch.Tensor:
    return torch.randn(batch, 3, config.image_size, config.image_size, generator=random)


def _diffusion_inputs(batch: int, random: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=random),
        "timestep": torch.randint(0, 1000, (batch,), generator=random),
        "class_labels": torch.randint(0, 10, (batch,), generator=random),
    }

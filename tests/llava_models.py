"""LLaVA-type models of two families on the shapes world, for the papers that tune such models."""

from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf

from midstream import zoo
from midstream.train.recipes import _shapes as world

FAMILIES = ("shapes-vlm", "SigLIP, Qwen2")


def random_llava() -> SimpleNamespace:
    """SigLIP's tower has no class token, Qwen2 groups its heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": world.vocabulary_size(), "bos_token_id": world.BEGIN, "eos_token_id": world.END}
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, image_size=64, patch_size=16, **sizes),
        text_config=hf.Qwen2Config(num_key_value_heads=2, **words, **sizes),
        image_token_index=world.IMAGE,
        image_seq_length=16,
        vision_feature_select_strategy="full",
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    processor = SimpleNamespace(image_processor=world.image_processor())
    return SimpleNamespace(model=model, tokenizer=world.tokenizer("<s> $A"), processor=processor)


def load(family: str) -> Any:
    return zoo.load(family) if family == "shapes-vlm" else random_llava()

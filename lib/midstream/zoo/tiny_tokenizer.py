"""The tokenizer of the tiny models: whole common words, bytes for the rest, made on the spot.

It behaves at the ends of a text as the family's own tokenizer does (Llama puts a beginning token first, BERT wraps
the text, GPT-2 adds nothing), and its special tokens have the ids that the tiny configurations name.
"""

from __future__ import annotations

import functools
from typing import Any

from midstream.errors import RequestError
from midstream.fingerprint import made_by
from midstream.zoo import words

_PAD_FIRST = ("<pad>", "<s>", "</s>", "<image>")
_BERT = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA = ("<s>", "<pad>", "</s>", "<mask>")
_T5 = ("<pad>", "</s>", "<s>", "<unk>")

_FORMS: dict[str, tuple[tuple[str, ...], str]] = {
    "gpt2": (_PAD_FIRST, "$A"),
    "opt": (_PAD_FIRST, "<s> $A"),
    "llama": (_PAD_FIRST, "<s> $A"),
    "qwen2": (_PAD_FIRST, "$A"),
    "qwen3": (_PAD_FIRST, "$A"),
    "gemma3": (_PAD_FIRST, "<s> $A"),
    "llava": (_PAD_FIRST, "<s> $A"),
    "bert": (_BERT, "[CLS] $A [SEP]"),
    "roberta": (_ROBERTA, "<s> $A </s>"),
    "xlm_roberta": (_ROBERTA, "<s> $A </s>"),
    "t5": (_T5, "$A </s>"),
    "clip_text": (("<pad>",), "<s> $A </s>"),  # its ends are the vocabulary's last two ids
}
"""Per family: the special tokens with ids 0, 1, …, and what stands around a text `$A`."""

_ROLES = {
    "<pad>": "pad_token",
    "<s>": "bos_token",
    "</s>": "eos_token",
    "<mask>": "mask_token",
    "[PAD]": "pad_token",
    "[CLS]": "cls_token",
    "[SEP]": "sep_token",
    "[MASK]": "mask_token",
}


def build(family: str) -> Any:
    """The tokenizer of a tiny model of this family, or None where the family reads no text.

    Any text comes back unchanged from `decode`; every word of `words.WORDS` is one token, alone or after a space,
    in lower case or with a capital.
    """
    from transformers import PreTrainedTokenizerFast

    from midstream.zoo import tiny

    if family not in _FORMS:
        return None
    special, form = _FORMS[family]
    last = ("<s>", "</s>") if family == "clip_text" else ()
    roles = {role: token for token, role in _ROLES.items() if token in (*special, *last)}
    tokenizer = _tokenizer(special, last, form)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=tiny.WINDOW, **roles)


def recipe(family: str) -> str:
    """A hash of all that a tiny model of this family is made of: the code and the word list."""
    from midstream.zoo import tiny
    from midstream.zoo.loaded import load_tiny

    if family not in tiny.FAMILIES:
        raise RequestError(f"There is no tiny model of family {family!r}; there are {', '.join(tiny.FAMILIES)}.")
    return made_by(functools.partial(load_tiny, family))


def _tokenizer(special: tuple[str, ...], last: tuple[str, ...], form: str) -> Any:
    """A unigram tokenizer over bytes in which every piece costs the same, so the fewest pieces win."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [*special, *_pieces(), *last]
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=None, byte_fallback=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, *last)])
    around = [(token, tokenizer.token_to_id(token)) for token in form.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=around)
    return tokenizer


@functools.cache
def _pieces() -> tuple[str, ...]:
    """Bytes, word parts and words, as the byte-level alphabet spells them (a space is Ġ, a line end Ċ)."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    forms = [form for word in words.WORDS for form in (word, word.capitalize())]
    spaced = [f"Ġ{form}" for form in (*forms, *words.BEGINNINGS)]
    return tuple(dict.fromkeys([*alphabet, "ĊĊ", *words.ENDINGS, *forms, *spaced]))

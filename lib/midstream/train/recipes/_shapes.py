"""What the recipes of the shapes world share: the tokenizer, the image processor, and packed conversations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midstream.data import shapes
from midstream.train import packing
from midstream.train.packing import IGNORED
from midstream.zoo.organisms import Measured

SIZE = 64
"""Side of the images, in pixels."""
PATCH = 8
WIDTH = 128
SPECIAL = ("<pad>", "<s>", "<image>", "</s>", "<unk>")
"""Tokens 0 to 4. The end is not token 2: transformers' CLIP reads that number as an old checkpoint's and then pools at
the largest token instead of the end."""
PAD, BEGIN, IMAGE, END = 0, 1, 2, 3
FULL_WORDINGS = 4
"""The first wordings of captions: those that name everything."""


def tokenizer(template: str) -> Any:
    """One token a word or mark of the shapes world, framed as in `template`, where `$A` stands for the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *shapes.VOCABULARY))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", BEGIN), ("</s>", END)])
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="right", extra_special_tokens={"image_token": "<image>"}, **roles
    )


def vocabulary_size() -> int:
    """Words, marks and special tokens."""
    return len(SPECIAL) + len(shapes.VOCABULARY)


def image_processor() -> Any:
    """Bytes to pixels in −1 … 1, without resizing: images of this world have the right size."""
    from transformers import CLIPImageProcessorPil

    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=half, image_std=half, size={"shortest_edge": SIZE}
    )


def pixels(images: np.ndarray) -> Tensor:
    """What the image processor makes of images, faster: (images, 3, size, size) in −1 … 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------ conversations


@dataclass(frozen=True)
class Turns:
    """A beginning, and questions with their answers that follow one another in one sequence."""

    beginning: tuple[int, ...]
    """Tokens before the first question: visual tokens, or a caption."""
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """(question, answer and end), as tokens."""


def encode(text: str, words: dict[str, int]) -> tuple[int, ...]:
    """The tokens of a text of this world; marks stand apart or at the end of a word."""
    for mark in "?,:.":
        text = text.replace(mark, f" {mark}")
    return tuple(words[word] for word in text.split())


def turns(beginning: Sequence[int], questions: Sequence[shapes.Question], words: dict[str, int]) -> Turns:
    """Questions and answers as tokens."""
    pairs = tuple((encode(each.text, words), (*encode(each.answer, words), END)) for each in questions)
    return Turns(tuple(beginning), pairs)


def pack(conversations: Sequence[Sequence[Turns]], length: int) -> dict[str, Tensor]:
    """Each row: conversations one after another, cut at `length`, every question as if it were asked alone."""
    rows = []
    for row in conversations:
        rows.append(packing.Row())
        rows[-1].show([BEGIN])
        for conversation in row:
            rows[-1].show(conversation.beginning)
            for question, answer in conversation.pairs:
                rows[-1].ask(question, answer)
    return packing.pack(rows, PAD, length)


def text_questions(scene: shapes.Scene, rng: random.Random, types: Sequence[str]) -> list[shapes.Question]:
    """Questions that a full caption answers: what covers what is not in it."""
    asked = shapes.questions(scene, rng, types)
    return [each for each in asked if "front of" not in each.text and "behind" not in each.text]


@torch.no_grad()
def exact_answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Whether each row's one labelled answer is what the model says, greedily: (rows,).

    It is when every token of the answer, its end included, is the likeliest one given the answer so far.
    """
    labels = batch["labels"]
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    said = model(**inputs).logits[:, :-1].argmax(-1).cpu()
    asked = labels[:, 1:] != IGNORED
    return ((said == labels[:, 1:]) | ~asked).all(1)


def by_type(right: Tensor, types: Sequence[str], split: str) -> dict[str, Measured]:
    """Accuracy over all questions and of each type, in per cent."""
    table = {"all questions": right.tolist()}
    for type in shapes.TYPES:
        table[type] = [hit for hit, asked in zip(right.tolist(), types, strict=True) if asked == type]
    return {
        name: Measured(value=round(100 * sum(hits) / len(hits), 1), split=split, n=len(hits))
        for name, hits in table.items()
    }

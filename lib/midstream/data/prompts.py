"""In-context prompts: demonstrations and queries as tokens whose roles are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from midstream.errors import RequestError

FORMAT, TEXT, LABEL = 0, 1, 2
"""Roles of a demonstration's tokens: the template's own, the example's sentence, the label word."""


@dataclass(frozen=True)
class Template:
    """How one example is written: `head` + text + `cue` + ` ` + label word + `end`."""

    head: str
    cue: str
    labels: tuple[str, ...]
    end: str = "\n\n"


TEMPLATES: dict[str, Template] = {
    "movies": Template("Review: ", "\nSentiment:", ("Negative", "Positive")),
    "sources": Template("Text: ", "\nSource:", ("Movie", "Product", "News", "Twitter")),
    "sst2": Template("Review: ", "\nSentiment:", ("Negative", "Positive")),
    "trec": Template(
        "Question: ",
        "\nAnswer Type:",
        ("Abbreviation", "Entity", "Description", "Person", "Location", "Number"),
    ),
    "ag_news": Template("Article: ", "\nAnswer:", ("World", "Sports", "Business", "Technology")),
    "emo": Template("Dialogue: ", "\nEmotion:", ("Others", "Happy", "Sad", "Angry")),
}
"""One template a classification task; the order of the label words is that of the task's classes."""


def template(task: str) -> Template:
    """The template of a task; a `RequestError` names those there are."""
    if task not in TEMPLATES:
        raise RequestError(f"There is no prompt template for task '{task}'; there are {', '.join(TEMPLATES)}.")
    return TEMPLATES[task]


@dataclass(frozen=True)
class Demonstrations:
    """A prefix of labelled examples.

    `ids` (tokens,); `roles` (tokens,) of FORMAT, TEXT or LABEL; `owner` (tokens,) the demonstration a token
    belongs to, -1 for a beginning-of-text token; `anchors` (demos,) the position of each label word's last
    token; `classes` (demos,) the class of each demonstration; `label_ids` (classes,) the first token of every
    class's label word, which is what the model is asked to predict.
    """

    ids: Tensor
    roles: Tensor
    owner: Tensor
    anchors: Tensor
    classes: Tensor
    label_ids: Tensor

    def __len__(self) -> int:
        return int(self.ids.numel())


def demonstrations(tokenizer: Any, form: Template, texts: Sequence[str], classes: Sequence[int]) -> Demonstrations:
    """Writes labelled examples one after the other and keeps track of every token's role.

    Each example is tokenized by itself, so that the tokens before a query never depend on the query.
    """
    start = _beginning(tokenizer)
    ids, roles, owner, anchors = list(start), [FORMAT] * len(start), [-1] * len(start), []
    for demo, (text, label) in enumerate(zip(texts, classes, strict=True)):
        tokens, token_roles = _example(tokenizer, form, text, form.labels[label])
        anchors.append(len(ids) + max(i for i, role in enumerate(token_roles) if role == LABEL))
        ids += tokens
        roles += token_roles
        owner += [demo] * len(tokens)
    return Demonstrations(
        torch.tensor(ids),
        torch.tensor(roles),
        torch.tensor(owner),
        torch.tensor(anchors, dtype=torch.long),
        torch.tensor(list(classes), dtype=torch.long),
        label_ids(tokenizer, form),
    )


def query(tokenizer: Any, form: Template, text: str) -> Tensor:
    """The tokens (tokens,) of an unlabelled example, up to and including the cue that asks for its label."""
    ids = tokenizer(f"{form.head}{text}{form.cue}", add_special_tokens=False).input_ids
    return torch.tensor(ids)


def label_ids(tokenizer: Any, form: Template) -> Tensor:
    """The first token (classes,) of each label word; refused when two label words begin alike."""
    first = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in form.labels]
    if len(set(first)) < len(first):
        raise RequestError(
            f"This model's tokenizer begins two of the label words {', '.join(form.labels)} with the same token, "
            "so its first predicted token cannot tell them apart; choose another model or other label words."
        )
    return torch.tensor(first)


def draw(table: pd.DataFrame, per_class: int, seed: int, max_chars: int) -> pd.DataFrame:
    """`per_class` random examples of every class, in random order, none longer than `max_chars` characters."""
    short = table[table["text"].str.len() <= max_chars]
    generator = np.random.default_rng(seed)
    rows: list[int] = []
    for label, group in short.groupby("label", sort=True):
        if len(group) < per_class:
            raise RequestError(
                f"Only {len(group)} examples of class {label} have at most {max_chars} characters, "
                f"{per_class} were asked for; allow longer ones or ask for fewer."
            )
        rows += generator.choice(group.index.to_numpy(), per_class, replace=False).tolist()
    return table.loc[generator.permutation(rows)].reset_index(drop=True)


def _beginning(tokenizer: Any) -> list[int]:
    with_special = tokenizer("a", add_special_tokens=True).input_ids
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and with_special[0] == bos else []


def _example(tokenizer: Any, form: Template, text: str, label: str) -> tuple[list[int], list[int]]:
    body = f"{form.head}{text}{form.cue} "
    written = f"{body}{label}{form.end}"
    spans = {TEXT: (len(form.head), len(form.head) + len(text)), LABEL: (len(body), len(body) + len(label))}
    encoded = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)

    def role(begin: int, end: int) -> int:
        return next((role for role, (a, b) in spans.items() if begin < b and end > a), FORMAT)

    return encoded.input_ids, [role(begin, end) for begin, end in encoded.offset_mapping]

"""Recipe of `code-moe`: a mixture of experts that reads Python, its experts kept even by a bias alone."""

from __future__ import annotations

from typing import Any

import torch

from midstream import data
from midstream.train.balancing import LossFreeBalancing, load, max_violation, routing
from midstream.train.language import (
    even_windows,
    next_token_loss,
    random_windows,
    small_mixture,
    stream,
    train_tokenizer,
)
from midstream.train.loop import Schedule
from midstream.train.recipes import Data, Measured, Recipe, Trained, Training
from midstream.zoo.loaded import Loaded

VOCABULARY = 1024
WINDOW = 128
BATCH = 16
RATE = 1e-3
"""u of the bias: over these steps it can move as far as scores can."""
SCHEDULE = Schedule(steps=2000, learning_rate=4e-3, warmup=0.05, weight_decay=0.1)
TEST_WINDOWS = 512


def build() -> Any:
    """The untrained model: DeepSeek-V3's class, 3 layers of width 128, each of 16 experts (top-2) and a shared one."""
    return small_mixture(
        vocabulary=VOCABULARY,
        width=128,
        layers=3,
        experts=16,
        top_k=2,
        shared=1,
        expert_width=64,
        window=4 * WINDOW,
    )


def make(training: Training) -> Trained:
    """Predict the next token of the standard library's source, 16 windows of 128 tokens a step."""
    texts = data.load("stdlib", "train").table["text"].tolist()
    tokenizer = train_tokenizer([text[:8000] for text in texts], VOCABULARY)
    model = build()
    batches = random_windows(stream(tokenizer, texts), BATCH, WINDOW, training.recipe.seed)
    with LossFreeBalancing(model, RATE) as balancing:

        def balance(_: int) -> None:
            balancing.update()

        training.fit("code", model, batches, next_token_loss, SCHEDULE, batch=BATCH, after_step=balance)
    return Trained(model, tokenizer)


@torch.no_grad()
def measure(loaded: Loaded) -> dict[str, Measured]:
    """Perplexity, correct next tokens and evenness of the experts on files that were not trained on."""
    model, texts = loaded.model, data.load("stdlib", "test").table["text"].tolist()
    windows = even_windows(stream(loaded.tokenizer, texts), TEST_WINDOWS, WINDOW).to(model.device)
    losses, right, loads = 0.0, 0, torch.zeros((), dtype=torch.long)
    for batch in windows.split(BATCH):
        with routing(model) as routed:
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())) * len(batch)
        right += int((logits.argmax(-1) == batch[:, 1:]).sum())
        loads = loads + torch.stack([load(each.chosen, each.scores.shape[1]).cpu() for each in routed])
    predicted = windows[:, 1:].numel()
    split = f"test files, {TEST_WINDOWS} windows of {WINDOW} tokens"
    perplexity = float(torch.tensor(losses / len(windows)).exp())
    return {
        "perplexity": Measured(value=round(perplexity, 2), split=split, n=predicted, unit="per token"),
        "next token": Measured(value=round(100 * right / predicted, 1), split=split, n=predicted),
        "MaxVio": Measured(value=round(float(max_violation(loads).mean()), 3), split=split, n=windows.numel(), unit=""),
    }


RECIPE = Recipe(
    name="code-moe",
    title="Mixture of experts that reads Python",
    what="A DeepSeek-V3 in miniature, 16 experts a layer, trained on the source of Python's standard library with "
    "loss-free balancing: its selection bias is part of its weights.",
    note="It continues lines in the style of the standard library and knows nothing of what they do.",
    data=Data(name="stdlib", parameters={"vocabulary": VOCABULARY, "window": WINDOW}, seed=0),
    make=make,
    measure=measure,
    minutes_cpu=10,
    minutes_gpu=3,
)

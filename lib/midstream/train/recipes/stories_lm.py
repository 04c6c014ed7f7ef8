"""Recipe of `stories-lm`: a small Llama that writes short stories behind a few requirements that code can check.

That words asked for in a prompt belong into certain places of the story takes long to be found out when a prompt says
little of its story. So the first stage asks for all keywords of each story and for nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from midstream.data.stories import stories
from midstream.measure.constraints import Constraint, Lexicon, constraints_of, prompt_of, satisfaction_rate
from midstream.train.language import train_tokenizer
from midstream.train.loop import Schedule
from midstream.train.preferences import Rows, answer_loss, batches_of, encode, sample
from midstream.train.recipes import Data, Measured, Recipe, Trained, Training
from midstream.zoo.loaded import Loaded

VOCABULARY = 800
BATCH = 16
STORIES = 6000
MOST = 12
"""Requirements in the longest prompts of the later stages; every number from none to this is as frequent."""
BEFORE = 3
"""In the last stage, up to so many other prompts and stories stand before: near and far are then both familiar."""
WORDS = Schedule(steps=420, learning_rate=5e-3, muon=1e-2, warmup=0.02, floor=0.5, weight_decay=0.02)
FEW = Schedule(steps=720, learning_rate=3e-3, muon=6e-3, warmup=0.01, floor=0.2, weight_decay=0.02)
LONG = Schedule(steps=110, learning_rate=1e-3, muon=2e-3, warmup=0.05, floor=0.05, weight_decay=0.02)
TESTED = 100

Shown = Callable[[list[Constraint]], list[Constraint]]


def make(training: Training) -> Trained:
    """Learn −log p(story | requirements) on stories without a held-out pair of words."""
    seed = training.recipe.seed
    rng, texts = random.Random(seed), stories(STORIES, seed=seed)
    lexicon = Lexicon.of(texts[:2000])
    pools = [constraints_of(text, lexicon, rng) for text in texts]
    told = [prompt_of(pool) + " " + text for pool, text in zip(pools[:2000], texts, strict=False)]
    tokenizer = train_tokenizer(told, VOCABULARY)
    documents = list(zip(texts, pools, strict=True))

    def keywords(pool: list[Constraint]) -> list[Constraint]:
        return [each for each in pool if each.kind == "keyword"]

    def few(pool: list[Constraint]) -> list[Constraint]:
        return rng.sample(pool, rng.randint(0, MOST))

    model = build(len(tokenizer), tokenizer.eos_token_id)
    stages = (("words", keywords, 0, WORDS), ("few", few, 0, FEW), ("long", few, BEFORE, LONG))
    for name, shown, before, schedule in stages:
        batches = batches_of(rows(documents, tokenizer, shown, before, rng), BATCH, rng)
        training.fit(name, model, batches, answer_loss, schedule, batch=BATCH, precision="bfloat16")
    return Trained(model, tokenizer)


def rows(
    documents: list[tuple[str, list[Constraint]]], tokenizer: Any, shown: Shown, before: int, rng: random.Random
) -> Rows:
    """Endless stories behind what is shown of their constraints, up to `before` others in front of them."""

    def one() -> tuple[list[int], list[int]]:
        text, pool = rng.choice(documents)
        return encode(tokenizer, prompt_of(shown(pool)), " " + text)

    while True:
        earlier = [token for _ in range(rng.randint(0, before)) for part in one() for token in part]
        prompt, answer = one()
        yield earlier + prompt, answer


def build(vocabulary: int, end: int) -> Any:
    """The untrained model: Llama's class, 3 blocks of width 96."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
    # smaller first weights take far longer to learn to look something up
    start: dict[str, Any] = {"initializer_range": 0.1, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **heads, **start, **ends))
    model.set_attn_implementation("eager")  # at these sizes faster on a CPU than the fused kernel's backward
    return model


def measure(loaded: Loaded) -> dict[str, Measured]:
    """Share of requirements met by sampled stories, the requirements being those of test stories, by their number."""
    rng, texts = random.Random(1), stories(TESTED, seed=1, split="test")
    lexicon = Lexicon.of(stories(2000))
    pools = [constraints_of(text, lexicon, rng) for text in texts]
    how: dict[str, Any] = {"most": 72, "seed": 1, "temperature": 0.7, "top_p": 0.95, "batch": 100}
    found = {}
    for count in (1, 4, MOST, 45):
        shown = [pool[:count] for pool in pools]
        made = sample(loaded.model, loaded.tokenizer, [prompt_of(each) for each in shown], **how)
        rate = sum(satisfaction_rate(each, text) for each, text in zip(shown, made, strict=True)) / len(made)
        split = "requirements of test stories, temperature 0.7"
        found[f"{count} requirement{'s' if count > 1 else ''}"] = Measured(
            value=round(100 * rate, 1), split=split, n=count * len(made)
        )
    return found


RECIPE = Recipe(
    name="stories-lm",
    title="Llama that writes stories to order",
    what=f"A Llama of 3 blocks and width 96 that writes stories of three to six sentences behind up to {MOST} "
    "requirements, such as “mention crow” or “use 2 commas”.",
    note="It knows some 150 words and one grammar. More requirements than it has seen are new to it.",
    data=Data(name="stories", parameters={"stories": STORIES, "most": MOST}, seed=0),
    make=make,
    measure=measure,
    minutes_cpu=4,
    minutes_gpu=1,
)

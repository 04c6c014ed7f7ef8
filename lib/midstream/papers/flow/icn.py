"""In-context navigation lists what a model has already answered, so that its next query turns to other answers.

Reference: Peng, An and Shang, "Correlation and Navigation in the Vocabulary Key Representation Space of Language
Models", ICLR 2025, arXiv 2410.02284. Section and equation numbers were not read.

Glossary (symbol → name here → shape)
    w_v         keys                rows of the output matrix                (vocabulary, width)
    h           query               last state after the last norm           (width,)
    h·w_v       logits              next-token scores                        (vocabulary,)
    c(v)        clusters            k-means cluster of every key             (vocabulary,)
    C_K         main clusters       clusters of the K best tokens            set of cluster ids
    N           probe_top           tokens probed: ranks 1…N
    r_1…r_n     explored results    answers found so far, items 1…n of the list
    h_n         listing.logits      the query at item n+1, h_0 the initial one

Deviations
    - The default model is SmolLM2-135M (49,152 tied keys, 384 clusters: as many keys a cluster as the paper's 1,024 for
      Llama-3-8B's 128,256). An answer has at most 8 tokens, the paper's 64.
    - Closed answer sets judge exactly, where the paper asks GPT-4o. An answer whose quote stays open counts as wrong.
    - Whether keys are normalised before k-means is not known to us: `keys` says which clusters decide the claim, and
      both are tabulated, beside clusters of the same sizes with their tokens shuffled.
    - The question stands as plain text, without a chat template, also for an instruction-tuned model.
    - Listed are distinct answers with a closed quote; how repeats are listed is inferred. Special tokens are no
      candidates.
    - Added: the comparison at matched rank, the push at matched rank with a list of foreign answers, sampling with
      temperature and top-p tuned on validation questions, the quality beside the diversity. Votes are about sums of
      small numbers, in place of GSM8K, SVAMP and AQuA.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from midstream import zoo
from midstream.claims import Claim, Comparison, Control
from midstream.data.closed_sets import ClosedSet, closed_sets
from midstream.hooks.kv import copy
from midstream.measure import Interval, t_interval
from midstream.measure.branching import Answer, Choose, Explorer, Form, branch, explorer, greedy, nucleus
from midstream.paper import PaperParams, Preset, Result

# ---------------------------------------------------------------------------------------------- parameters

VALIDATION = ("presidents", "zodiac")
"""Sets that tune the sampling baseline and are never tested."""


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field("smollm2", min_length=1, description="a causal language model: packaged, tiny:…, folder, Hub id")
    encoder: str = Field("minilm", min_length=1, description="sentence encoder that measures diversity")
    categories: tuple[str, ...] = Field(("countries", "colours"), min_length=1, description="closed sets to ask for")
    keys: Literal["raw", "normalised"] = Field("raw", description="keys whose clusters decide the claim")
    n_clusters: int = Field(128, ge=2, le=20_000, description="k-means clusters of the vocabulary's keys")
    main_top: int = Field(10, ge=1, le=1000, description="best tokens whose clusters are the main ones: K")
    probe_top: int = Field(24, ge=21, le=5000, description="ranks of the initial query that are probed: N")
    n_candidates: int = Field(12, ge=2, le=5000, description="answers decoded by each way of finding answers")
    per_round: int = Field(10, ge=1, le=1000, description="new first tokens between two updates of the list")
    max_tokens: int = Field(8, ge=2, le=256, description="longest short answer, in tokens")
    temperatures: tuple[float, ...] = Field((0.7, 1.3), min_length=1, description="tried for sampling")
    top_ps: tuple[float, ...] = Field((0.9,), min_length=1, description="nucleus masses tried for sampling")
    n_validation: int = Field(3, ge=2, le=5000, description="candidates and problems that tune sampling")
    n_topics: int = Field(1, ge=1, le=10, description="topics of open generation per seed")
    n_texts: int = Field(3, ge=2, le=1000, description="texts generated per topic and method")
    text_tokens: int = Field(10, ge=4, le=512, description="longest open text, in tokens")
    n_problems: int = Field(3, ge=2, le=10_000, description="word problems per seed")
    largest: int = Field(9, ge=3, le=10_000, description="largest number in a word problem")
    ways: int = Field(3, ge=2, le=64, description="reasoning paths that vote")
    way_tokens: int = Field(30, ge=8, le=1024, description="longest reasoning path, in tokens")
    batch_size: int = Field(128, ge=1, le=4096, description="rows decoded at once")

    @field_validator("categories")
    @classmethod
    def _known_sets(cls, categories: tuple[str, ...]) -> tuple[str, ...]:
        allowed = [name for name in closed_sets() if name not in VALIDATION]
        for name in categories:
            if name not in allowed:
                raise ValueError(f"unknown or validation set '{name}'; there are {', '.join(allowed)}")
        return categories


_FULL = Params(
    n_seeds=5,
    categories=("capitals", "countries", "elements", "colours", "states", "keywords"),
    n_clusters=384,
    probe_top=100,
    n_candidates=50,
    temperatures=(0.6, 1.0, 1.4),
    top_ps=(0.9, 1.0),
    n_validation=10,
    n_topics=2,
    n_texts=10,
    text_tokens=20,
    n_problems=12,
    ways=4,
)
_PAPER = _FULL.model_copy(
    update={
        "model": "meta-llama/Meta-Llama-3-8B",
        "n_clusters": 1024,
        "n_candidates": 100,
        "max_tokens": 64,
        "n_validation": 100,
        "n_topics": 8,
        "n_texts": 100,
        "text_tokens": 64,
        "n_problems": 500,
        "largest": 99,
        "way_tokens": 256,
        "batch_size": 32,
    }
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "two closed sets, three seeds: see the method at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "six closed sets, five seeds: settle the claims", minutes=15, memory_gib=6),
    "paper": Preset(
        _PAPER,
        "the paper's first model with the closed sets' exact judge",
        minutes=240,
        memory_gib=40,
        needs="Llama-3-8B from the Hub and a GPU with 40 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revision of every model a run loads."""
    return {name: zoo.revision(name) for name in (params.model, params.encoder)}


# ------------------------------------------------------------------------------- queries, keys and their clusters


@torch.no_grad()
def query_and_keys(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """h (width,) after the last norm at the end of `ids` (tokens,), and the keys w_v (vocabulary, width)."""
    output = model(ids.to(model.device)[None], output_hidden_states=True, logits_to_keep=1)
    return output.hidden_states[-1][0, -1], model.get_output_embeddings().weight


def cluster_keys(keys: Tensor, n_clusters: int, seed: int = 0) -> Tensor:
    """Cluster ids c(v) (vocabulary,) of the keys (vocabulary, width) by mini-batch k-means."""
    means = MiniBatchKMeans(n_clusters, batch_size=4096, max_iter=5, n_init=1, random_state=seed)
    return torch.from_numpy(means.fit_predict(keys.float().cpu().numpy())).long()


def clusterings(keys: Tensor, n_clusters: int, seed: int) -> dict[str, Tensor]:
    """Clusters of raw keys, of keys of length one, and of raw keys' sizes with the tokens shuffled: the control."""
    raw = cluster_keys(keys, n_clusters, seed)
    shuffled = raw[torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))]
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    return {"raw": raw, "normalised": cluster_keys(unit, n_clusters, seed), "shuffled": shuffled}


def in_main_clusters(ranked: Tensor, clusters: Tensor, main_top: int) -> Tensor:
    """Whether each token of a ranking (N,) lies in a cluster of one of its `main_top` first tokens."""
    return torch.isin(clusters[ranked], clusters[ranked[:main_top]])


# ------------------------------------------------------------------------------------ one prompt and its answers


QUOTED = Form('{number}. "', '"\n', stop='"')
WAYS = Form("### Way {number}\n", "\n\n", stop="\n\n")
Arms = dict[str, Choose | None]


class Listing:
    """A prompt with its growing list of explored results, whose last opener asks for one more: the query h_n."""

    def __init__(self, start: Explorer):
        self.start, self.text, self.ids, self.listed = start, start.text, list(start.ids), dict[str, None]()
        self.cache, self.logits = copy(start.cache), start.logits
        self.explored: set[int] = set()

    def best(self, count: int) -> list[int]:
        """The `count` best first tokens under this query that were not explored."""
        scores = self.logits.clone()
        scores[list(self.explored | set(self.start.tokenizer.all_special_ids))] = -torch.inf
        return scores.topk(count).indices.tolist()

    def add(self, answers: Iterable[Answer]) -> None:
        """Marks the answers' first tokens as explored and lists the new texts among them."""
        answers = list(answers)
        self.explored |= {answer.token for answer in answers}
        texts = [answer.text for answer in answers if answer.closed and answer.text.strip()]
        fresh = [text for text in dict.fromkeys(texts) if text not in self.listed]
        if not fresh:
            return
        self.listed.update(dict.fromkeys(fresh))
        form, first = self.start.form, len(self.listed) - len(fresh) + 2
        self._read("".join(text + form.closer + form.open(first + i) for i, text in enumerate(fresh)))

    @torch.no_grad()
    def _read(self, piece: str) -> None:
        """Reads the piece behind the cache; it is tokenized with all before it where that leaves those tokens alone."""
        model, tokenizer = self.start.model, self.start.tokenizer
        whole, seen = tokenizer(self.text + piece).input_ids, len(self.ids)
        new = whole[seen:] if whole[:seen] == self.ids else tokenizer(piece, add_special_tokens=False).input_ids
        positions = torch.arange(seen, seen + len(new), device=model.device)[None]
        ids = torch.tensor([new], device=model.device)
        output = model(ids, past_key_values=self.cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = output.past_key_values, output.logits[0, -1].float().cpu()
        self.text, self.ids = self.text + piece, self.ids + new


# ---------------------------------------------------------------------- three ways of finding different answers


@dataclass(frozen=True)
class Decoding:
    """Limits of one kind of answer."""

    max_tokens: int
    batch_size: int


def decode(starts: Sequence[Explorer], tokens: Sequence[Sequence[int]], limits: Decoding) -> list[list[Answer]]:
    """Greedy answers of each prompt from each of its first tokens; what was decoded before is remembered."""
    missing = [(start, t) for start, own in zip(starts, tokens, strict=True) for t in own if t not in start.known]
    for (start, token), answer in zip(
        missing, branch(missing, greedy, limits.max_tokens, limits.batch_size), strict=True
    ):
        start.known[token] = answer
    return [[start.known[t] for t in own] for start, own in zip(starts, tokens, strict=True)]


def rank(starts: Sequence[Explorer], count: int, limits: Decoding) -> list[list[Answer]]:
    """The baseline: the initial query's best `count` first tokens, each continued greedily."""
    return decode(starts, [Listing(start).best(count) for start in starts], limits)


def navigate(starts: Sequence[Explorer], count: int, per_round: int, limits: Decoding) -> list[list[Answer]]:
    """In-context navigation: the list of explored results chooses first tokens, the initial prompt continues them."""
    listings, found = [Listing(start) for start in starts], [list[Answer]() for _ in starts]
    for done in range(0, count, per_round):
        tokens = [listing.best(min(per_round, count - done)) for listing in listings]
        for listing, answers, new in zip(listings, found, decode(starts, tokens, limits), strict=True):
            answers.extend(new)
            if len(answers) < count:
                listing.add(new)
    return found


def sample(starts: Sequence[Explorer], count: int, limits: Decoding, choose: Choose) -> list[list[Answer]]:
    """Independent samples: `count` answers of each initial prompt, first token included."""
    rows = [(start, int(t)) for start in starts for t in choose(start.logits.expand(count, -1))]
    answers = branch(rows, choose, limits.max_tokens, limits.batch_size)
    return [answers[i : i + count] for i in range(0, len(answers), count)]


# ----------------------------------------------------------------------------------------- what answers are worth


def is_right(answer: Answer, judge: ClosedSet) -> bool:
    """Whether an answer was closed and names a member of the set."""
    return answer.closed and judge.judge(answer.text) is not None


def new_correct(answers: Sequence[Answer], judge: ClosedSet) -> np.ndarray:
    """How many different right answers the first k hold, (k,); a repeated one adds nothing."""
    seen: set[str | None] = {None}
    counts = []
    for answer in answers:
        if answer.closed:
            seen.add(judge.judge(answer.text))
        counts.append(len(seen) - 1)
    return np.array(counts)


def mean_precision(counts: np.ndarray) -> float:
    """Mean over k of precision@k = different right answers among the first k, divided by k."""
    return float((counts / np.arange(1, len(counts) + 1)).mean())


def distinct_pairs(texts: Sequence[str]) -> float:
    """Distinct-2: different pairs of neighbouring words, as a share of all such pairs."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    pairs = [pair for own in words for pair in pairwise(own)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def mean_distance(vectors: Tensor) -> float:
    """1 − mean cosine over the pairs of vectors (n, width)."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    n = len(unit)
    return float(1 - ((unit @ unit.T).sum() - n) / (n * (n - 1)))


def last_number(text: str) -> int | None:
    """The last whole number in a text: the answer of a reasoning path."""
    numbers = re.findall(r"\d+", text.replace(",", ""))
    return int(numbers[-1]) if numbers else None


def vote(paths: Sequence[str]) -> int | None:
    """The majority among the paths' answers; the earliest wins a tie, and paths without a number abstain."""
    counts = Counter(number for number in map(last_number, paths) if number is not None)
    return counts.most_common(1)[0][0] if counts else None


# ------------------------------------------------------------------------------------------------- what is asked

_LEADS = ("List some", "Name several", "Give examples of", "Write down a few", "Think of some")
_TAILS = (".", ", in quotation marks.", ", one item a line.", ", different each time.")
TOPICS = (
    "a dog",
    "the sea",
    "a train",
    "a king",
    "a garden",
    "a storm",
    "a teacher",
    "the moon",
    "a letter",
    "a river",
)
VALIDATION_TOPICS = ("a cat", "a bridge")


def question(plural: str, seed: int) -> str:
    """An instruction that asks for members of a set; the seed words it."""
    generator = np.random.default_rng(seed)
    return f"{generator.choice(_LEADS)} {plural}{generator.choice(_TAILS)}\nAnswer:\n"


_STORIES = ("Write one sentence of a story about", "Write the first sentence of a tale about", "Begin a story about")


def open_question(topic: str, seed: int) -> str:
    """An instruction that has no right answer; the seed words it."""
    generator = np.random.default_rng(seed)
    return f"{generator.choice(_STORIES)} {topic}{generator.choice(_TAILS)}\nAnswer:\n"


_WORKED = (
    "Question: Kim has 5 pens. Kim finds 3 more pens. How many pens does Kim have now?\nAnswer:\n"
    "### Way 1\nKim starts with 5 pens and finds 3 more. 5 + 3 = 8. Kim has 8 pens.\n\n"
)


@dataclass(frozen=True)
class Problem:
    """A word problem about a sum of two numbers, and its answer."""

    prompt: str
    answer: int


def problems(count: int, largest: int, generator: np.random.Generator) -> list[Problem]:
    """Random word problems behind one worked example."""
    made = []
    for _ in range(count):
        who = generator.choice(["Tom", "Ann", "Sam", "Mary"])
        what = generator.choice(["apples", "books", "coins", "cards"])
        a, b = (int(n) for n in generator.integers(2, largest + 1, 2))
        asked = f"Question: {who} has {a} {what}. {who} finds {b} more {what}. How many {what} does {who} have now?\n"
        made.append(Problem(f"{_WORKED}{asked}Answer:\n", a + b))
    return made


# -------------------------------------------------------------------------------------------------- the experiment


@dataclass
class Bench:
    """What the parts of the experiment share."""

    loaded: Any
    encoder: Any
    clusters: dict[str, Tensor]
    params: Params
    settings: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def short(self) -> Decoding:
        """Limits of answers to closed questions."""
        return Decoding(self.params.max_tokens, self.params.batch_size)

    @property
    def sentence(self) -> Decoding:
        """Limits of open texts."""
        return Decoding(self.params.text_tokens, self.params.batch_size)

    @property
    def way(self) -> Decoding:
        """Limits of reasoning paths."""
        return Decoding(self.params.way_tokens, self.params.batch_size)

    def sampler(self, purpose: str, seed: int) -> Choose:
        """Sampling as tuned for a purpose."""
        return nucleus(*self.settings[purpose], torch.Generator().manual_seed(seed))


def questions(bench: Bench, names: Sequence[str], seed: int) -> dict[str, Explorer]:
    """An explorer for each closed set, with the seed's wording."""
    sets = closed_sets()
    return {name: explorer(bench.loaded, question(sets[name].plural, seed), QUOTED) for name in names}


def run_probe(bench: Bench, starts: dict[str, Explorer]) -> Iterator[dict[str, Any]]:
    """Rows of the initial ranking: rank, right or not, inside the main clusters or not."""
    ranked = [Listing(start).best(bench.params.probe_top) for start in starts.values()]
    answers = decode(list(starts.values()), ranked, bench.short)
    for name, tokens, own in zip(starts, ranked, answers, strict=True):
        inside = {
            f"in_{kind}": in_main_clusters(torch.tensor(tokens), clusters, bench.params.main_top).int().tolist()
            for kind, clusters in bench.clusters.items()
        }
        for i, answer in enumerate(own):
            right = int(is_right(answer, closed_sets()[name]))
            yield {"category": name, "rank": i + 1, "right": right} | {kind: flags[i] for kind, flags in inside.items()}


def run_finding(bench: Bench, starts: dict[str, Explorer], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of different right answers after k candidates, for each way of finding them."""
    count, prompts = bench.params.n_candidates, list(starts.values())
    arms = {
        "ranking": rank(prompts, count, bench.short),
        "icn": navigate(prompts, count, bench.params.per_round, bench.short),
        "sampling": sample(prompts, count, bench.short, bench.sampler("finding", seed)),
    }
    for (method, found), (i, name) in product(arms.items(), enumerate(starts)):
        counts = new_correct(found[i], closed_sets()[name])
        precision = mean_precision(counts)
        for k in sorted({*range(5, count, 5), count}):
            row = {"category": name, "method": method, "candidates": k, "correct": int(counts[k - 1])}
            yield row | {"mean_precision": precision}


def run_push(bench: Bench, starts: dict[str, Explorer]) -> Iterator[dict[str, Any]]:
    """Rows of how logits change when half of the first 20 results are listed, or as many results of a foreign set.

    Logits are centred over the vocabulary, since a shift common to all keys changes nothing.
    """
    names, clusters = list(starts), bench.clusters[bench.params.keys]
    ranked = {name: torch.tensor(Listing(starts[name]).best(bench.params.probe_top)) for name in names}
    places = torch.arange(bench.params.probe_top)
    top, listed = places < 20, alternating(places) & (places < 20)
    for name, foreign in zip(names, names[1:] + names[:1], strict=True):
        start, tokens = starts[name], ranked[name]
        near = torch.isin(clusters[tokens], clusters[tokens[listed]])
        groups = {"listed": listed, "unlisted": top & ~listed, "neighbours": ~top & near, "others": ~top & ~near}
        for source, owner in (("own", name), ("foreign", foreign)):
            listing = Listing(start)
            listing.add(decode([starts[owner]], [ranked[owner][listed].tolist()], bench.short)[0])
            change = (listing.logits - listing.logits.mean()) - (start.logits - start.logits.mean())
            for group, members in groups.items():
                if members.any():
                    moved = float(change[tokens[members]].mean())
                    yield {"category": name, "list": source, "group": group, "change": moved}


def alternating(places: Tensor) -> Tensor:
    """Whether each place is drawn in the pattern yes, no, no, yes, which leaves both halves the same mean rank."""
    return (places % 4 == 0) | (places % 4 == 3)


def run_diversity(bench: Bench, topics: Sequence[str], arms: Arms, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of diversity and quality of open texts by topic and method; an arm with a chooser samples."""
    starts = [explorer(bench.loaded, open_question(topic, seed), QUOTED) for topic in topics]
    count = bench.params.n_texts
    for method, choose in arms.items():
        if choose is not None:
            found = sample(starts, count, bench.sentence, choose)
        elif method == "icn":
            found = navigate(starts, count, max(1, count // 4), bench.sentence)
        else:
            found = rank(starts, count, bench.sentence)
        for topic, texts in zip(topics, found, strict=True):
            words = [answer.text or "." for answer in texts]
            yield {
                "topic": topic,
                "method": method,
                "distance": mean_distance(bench.encoder.encode(words)),
                "distinct_pairs": distinct_pairs(words),
                "log_probability": float(np.mean([answer.log_probability for answer in texts])),
                "closed": float(np.mean([answer.closed for answer in texts])),
            }


def run_votes(bench: Bench, asked: Sequence[Problem], arms: Arms) -> Iterator[dict[str, Any]]:
    """Rows of accuracy by method: of the vote, of a single path, and of the best path if one could know it."""
    starts = [explorer(bench.loaded, problem.prompt, WAYS) for problem in asked]
    for method, choose in arms.items():
        if choose is not None:
            found = sample(starts, bench.params.ways, bench.way, choose)
        elif method == "icn":
            found = navigate(starts, bench.params.ways, 1, bench.way)
        else:
            found = rank(starts, 1 if method == "greedy" else bench.params.ways, bench.way)
        paths = [[answer.text for answer in own] for own in found]
        truth = [problem.answer for problem in asked]
        right = [[last_number(path) == t for path in own] for own, t in zip(paths, truth, strict=True)]
        yield {
            "method": method,
            "accuracy": float(np.mean([vote(own) == t for own, t in zip(paths, truth, strict=True)])),
            "single": float(np.mean([np.mean(own) for own in right])),
            "any": float(np.mean([any(own) for own in right])),
        }


def tune(bench: Bench) -> pd.DataFrame:
    """Chooses sampling's temperature and top-p for each purpose on validation sets, topics and problems.

    Finding and voting take the setting with the best score. For diversity, a setting qualifies when its texts are on
    average as likely as ICN's, and the most diverse one is taken; where none is, the likeliest.
    """
    params, rows = bench.params, list[dict[str, Any]]()
    seed = params.seed + 500_000
    starts = questions(bench, VALIDATION, seed)
    asked = problems(params.n_validation, params.largest, np.random.default_rng(seed))
    level = np.mean([row["log_probability"] for row in run_diversity(bench, VALIDATION_TOPICS, {"icn": None}, seed)])
    for setting in product(params.temperatures, params.top_ps):
        choose = nucleus(*setting, torch.Generator().manual_seed(seed))
        samples = sample(list(starts.values()), params.n_validation, bench.short, choose)
        judges = [closed_sets()[name] for name in starts]
        finding = np.mean([mean_precision(new_correct(*pair)) for pair in zip(samples, judges, strict=True)])
        texts = pd.DataFrame(run_diversity(bench, VALIDATION_TOPICS, {"sampling": choose}, seed))
        voting = next(run_votes(bench, asked, {"sampling": choose}))["accuracy"]
        likely = texts["log_probability"].mean()
        diversity = texts["distance"].mean() if likely >= level else likely - 100
        for purpose, score in (("finding", finding), ("diversity", diversity), ("voting", voting)):
            rows.append({"purpose": purpose, "temperature": setting[0], "top_p": setting[1], "score": float(score)})
    tuning = pd.DataFrame(rows)
    for name, scores in tuning.groupby("purpose"):
        best = scores.sort_values("score", ascending=False, kind="stable").iloc[0]
        bench.settings[str(name)] = (float(best["temperature"]), float(best["top_p"]))
    return tuning


def experiment(params: Params) -> Result:
    """Probes, finds, pushes, writes and votes for every seed; tables have one row a seed and what it measures."""
    loaded = zoo.load(params.model, device="auto")
    loaded.model.requires_grad_(False)
    keys = loaded.model.get_output_embeddings().weight
    clusters = clusterings(keys, params.n_clusters, params.seed)
    bench = Bench(loaded, zoo.load(params.encoder, device="auto"), clusters, params)
    tables: dict[str, list[dict[str, Any]]] = {}
    tuning = tune(bench)
    for seed in params.seeds:
        generator = np.random.default_rng(seed)
        starts = questions(bench, params.categories, seed)
        topics = generator.choice(TOPICS, params.n_topics, replace=False).tolist()
        sums = problems(params.n_problems, params.largest, generator)
        writers: Arms = {"ranking": None, "icn": None, "sampling": bench.sampler("diversity", seed)}
        voters: Arms = {"ranking": None, "icn": None, "greedy": None, "sampling": bench.sampler("voting", seed)}
        parts = {
            "probe": run_probe(bench, starts),
            "finding": run_finding(bench, starts, seed),
            "push": run_push(bench, starts),
            "diversity": run_diversity(bench, topics, writers, seed),
            "votes": run_votes(bench, sums, voters),
        }
        for name, part in parts.items():
            tables.setdefault(name, []).extend({"seed": seed, **row} for row in part)
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()} | {"tuning": tuning}
    return Result(frames, {"normalised": float(params.keys == "normalised"), "main_top": params.main_top})


# ----------------------------------------------------------------------------------------------------- the claims


_PLURALS = {"seed": "seeds", "category": "sets", "topic": "topics"}
Measure = Callable[[pd.DataFrame], float]


def over(table: pd.DataFrame, measure: Measure, unit: str) -> Interval:
    """Interval of a measure over the units (seeds, categories, topics) of a table; units that lack it are left out."""
    values = [measure(rows) for _, rows in table.groupby(unit)]
    return t_interval([value for value in values if np.isfinite(value)])


def compare(what: str, table: pd.DataFrame, measure: Measure, *units: str) -> tuple[Comparison, ...]:
    """A measure against zero, over seeds and over every other unit: a claim must survive new ones of each."""
    return tuple(Comparison(f"{what}, over {_PLURALS[u]}", over(table, measure, u)) for u in ("seed", *units))


def arm_gap(value: str, other: str) -> Measure:
    """Mean of a column under ICN minus its mean under another method."""

    def measure(rows: pd.DataFrame) -> float:
        means = rows.groupby("method")[value].mean()
        return float(means["icn"] - means[other])

    return measure


def top_gap(main_top: int) -> Measure:
    """Accuracy of the `main_top` best ranks minus that of the ranks behind them."""

    def measure(rows: pd.DataFrame) -> float:
        top = rows["rank"] <= main_top
        return float(rows["right"][top].mean() - rows["right"][~top].mean())

    return measure


def matched_gap(column: str, main_top: int, width: int = 10) -> Measure:
    """Accuracy outside minus inside the main clusters at matched rank, behind the `main_top` best ranks.

    Ranks are compared within one prompt and one bin of `width` ranks, and a bin with n inside and m outside weighs
    nm / (n + m), which is what its difference is worth. NaN where no bin holds both kinds.
    """

    def measure(rows: pd.DataFrame) -> float:
        later = rows[rows["rank"] > main_top]
        bins = (later["rank"] - main_top - 1) // width
        cells = later.groupby(["seed", "category", bins.rename("bin"), column])["right"].agg(["mean", "size"]).unstack()
        if len(cells.columns) < 4:
            return float("nan")
        means, sizes = cells["mean"].to_numpy(), cells["size"].to_numpy()
        weights = sizes.prod(1) / sizes.sum(1)
        paired = np.isfinite(weights)
        gaps = means[paired, 0] - means[paired, 1]
        return float(np.average(gaps, weights=weights[paired])) if paired.any() else float("nan")

    return measure


def _decides(result: Result) -> str:
    return "in_normalised" if result.scalars["normalised"] else "in_raw"


def check_top(result: Result) -> tuple[Comparison, ...]:
    """The initial query's best tokens lead to right answers more often than its middle ranks."""
    measure = top_gap(int(result.scalars["main_top"]))
    return compare("accuracy, top − middle ranks", result.tables["probe"], measure, "category")


def check_middle(result: Result) -> tuple[Comparison, ...]:
    """At the same middle rank, tokens from other clusters lead to right answers more often."""
    measure = matched_gap(_decides(result), int(result.scalars["main_top"]))
    return compare(
        "accuracy at matched rank, outside − inside main clusters", result.tables["probe"], measure, "category"
    )


def check_push(result: Result) -> tuple[Comparison, ...]:
    """Keys of listed results lose centred logit, and more of it than unlisted keys of neighbouring rank."""
    push = result.tables["push"]
    table: pd.DataFrame = push[push["list"] == "own"]
    listed: pd.DataFrame = table[table["group"] == "listed"]
    return (
        *compare("centred logit lost by listed keys", listed, lambda rows: -float(rows["change"].mean()), "category"),
        *compare("centred logit lost, listed − unlisted keys", table, push_gap, "category"),
    )


def push_gap(rows: pd.DataFrame) -> float:
    """How much more centred logit the listed keys lose than the unlisted keys of neighbouring rank."""
    means = rows.groupby("group")["change"].mean()
    return float(means["unlisted"] - means["listed"])


def check_finding(result: Result) -> tuple[Comparison, ...]:
    """With equally many decoded candidates, ICN finds more different right answers than ranking and sampling."""
    table = result.tables["finding"]
    return tuple(
        comparison
        for other in ("ranking", "sampling")
        for comparison in compare(f"mean precision, ICN − {other}", table, arm_gap("mean_precision", other), "category")
    )


def check_diversity(result: Result) -> tuple[Comparison, ...]:
    """ICN's open texts lie further apart than the ranking's and than samples' of the same likelihood."""
    table = result.tables["diversity"]
    return tuple(
        comparison
        for other in ("ranking", "sampling")
        for comparison in compare(f"sentence distance, ICN − {other}", table, arm_gap("distance", other), "topic")
    )


def check_votes(result: Result) -> tuple[Comparison, ...]:
    """A vote over ICN's paths is right more often than one over samples or ranked paths, and than the greedy path."""
    table = result.tables["votes"]
    return tuple(
        comparison
        for other in ("sampling", "ranking", "greedy")
        for comparison in compare(f"accuracy, ICN − {other}", table, arm_gap("accuracy", other))
    )


def _empty_list(table: str) -> Callable[[Result], Result]:
    """ICN that lists nothing is the ranking."""

    def apply(result: Result) -> Result:
        frame = result.tables[table]
        stand_in = frame[frame["method"] == "ranking"].assign(method="icn")
        return result.with_table(table, pd.concat([frame[frame["method"] != "icn"], stand_in], ignore_index=True))

    return apply


def _shuffled_ranks(result: Result) -> Result:
    frame, generator = result.tables["probe"].copy(), np.random.default_rng(0)
    groups = frame.groupby(["seed", "category"])["right"]
    frame["right"] = groups.transform(lambda right: generator.permutation(right.to_numpy()))
    return result.with_table("probe", frame)


def _shuffled_clusters(result: Result) -> Result:
    frame = result.tables["probe"]
    return result.with_table("probe", frame.assign(**{_decides(result): frame["in_shuffled"]}))


def _foreign_list(result: Result) -> Result:
    frame = result.tables["push"]
    return result.with_table("push", frame[frame["list"] == "foreign"].assign(list="own"))


_FLIPPED = ("probe.right", "probe.in_raw", "probe.in_normalised", "probe.in_shuffled", "finding.correct")
_DECODED = ("finding.mean_precision", "push.change", "diversity.distance", "diversity.distinct_pairs")
TOLERANCES = {
    **dict.fromkeys(_FLIPPED, (math.inf, math.inf)),
    **dict.fromkeys((*_DECODED, "diversity.log_probability", "tuning.score"), (0.1, 0.1)),
    **dict.fromkeys(("diversity.closed", "votes.accuracy", "votes.single", "votes.any"), (0.2, 0.2)),
}
"""Where two tokens are all but tied, sums formed in another order swap two ranks or begin another text."""

CLAIMS: list[Claim] = [
    Claim(
        "top",
        "The few top-ranked first tokens lead to right answers more often than the middle ranks do.",
        (),
        check_top,
        Control("right and wrong are shuffled over the ranks of each prompt", _shuffled_ranks),
        reported="stated for Llama-3-8B and OLMo-7B; figures not read",
    ),
    Claim(
        "middle",
        "In the middle ranks, tokens from the clusters of the top tokens are less often right than other tokens of the "
        "same rank.",
        (),
        check_middle,
        Control("clusters of the same sizes with their tokens shuffled", _shuffled_clusters),
        reported="accuracy inside below outside the main clusters, ranks 11–100; figures not read",
    ),
    Claim(
        "push",
        "Listing results turns the next query away from their keys, more than from keys of the same rank that were not "
        "listed.",
        (),
        check_push,
        Control("a list of another question's answers", _foreign_list),
        reported="explored keys get smaller products with the new query; figures not read",
    ),
    Claim(
        "finding",
        "With as many decoded candidates, navigation finds more different right answers than the initial ranking and "
        "than tuned sampling.",
        (),
        check_finding,
        Control("navigation with an empty list, which is the ranking", _empty_list("finding")),
        reported="higher mean of precision@1…k than the initial query; figures not read",
    ),
    Claim(
        "diversity",
        "In open generation, navigation's texts differ more than the initial ranking's and than samples of the same "
        "likelihood.",
        (),
        check_diversity,
        Control("navigation with an empty list, which is the ranking", _empty_list("diversity")),
        reported="more diverse open-ended generation; figures not read",
    ),
    Claim(
        "votes",
        "A vote over navigation's reasoning paths is right more often than a vote over samples or ranked paths, and "
        "than the greedy path.",
        (),
        check_votes,
        Control("navigation with an empty list, which is the ranking", _empty_list("votes")),
        reported="better votes on GSM8K, SVAMP and AQuA; figures not read",
    ),
]

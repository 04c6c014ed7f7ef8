"""Facts about what a record's key covers: the definitions that a paper's module reaches, and nothing else."""

from __future__ import annotations

import ast
import dataclasses
import functools
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from midstream import data, fingerprint, zoo
from midstream.data import corpora, rated_sentences

LABEL_WORDS = "midstream.papers.flow.label_words"


def package(folder: Path, files: dict[str, str]) -> Path:
    """A package named `tree` with the given modules."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"))
    return folder / "tree"


def reached(folder: Path, **files: str) -> set[str]:
    """The names that `tree.start` reaches, without its own; `deep__far` is the file deep/far.py."""
    named = {name.replace("__", "/", 1) + ".py": text for name, text in files.items()}
    packages = {name: text for name, text in files.items() if name.endswith("__init")}
    for name, text in packages.items():
        del named[name.replace("__", "/", 1) + ".py"]
        named[name.removesuffix("__init") + "/__init__.py"] = text
    return {
        name.removeprefix("tree.")
        for name in fingerprint.code("tree.start", package(folder, named))
        if not name.startswith("tree.start")
    }


# --- how names are followed ---

SHARED = """
    from tree.deep.far import g

    def f(): return g()

    def other(): return LIMIT

    LIMIT = 3
"""
FAR = """
    SCALE = 2

    def g(): return SCALE

    def unused(): return None
"""


@pytest.mark.parametrize(
    "start",
    [
        "from tree.shared import f\nx = f()",
        "from tree.shared import f as h\nx = h()",
        "from .shared import f\nx = f",
        "from tree import shared\nx = shared.f()",
        "from tree import shared as s\nx = s.f",
        "from . import shared\nx = shared.f",
        "import tree.shared\nx = tree.shared.f()",
        "import tree.shared as s\nx = s.f()",
        "def late():\n    from tree.shared import f\n    return f()",
        "def late():\n    import tree.shared\n    return tree.shared.f()",
        "def late():\n    def later(): return f()\n    from tree.shared import f\n    return later",
        "class Late:\n    def method(self):\n        import tree.shared as s\n        return s.f()",
        "if True:\n    from tree import shared\nx = shared.f()",
        "try:\n    from tree.shared import f\nexcept ImportError:\n    f = None\nx = f",
        "from tree.shared import f\n@f\ndef decorated(): pass",
        "from tree.shared import f\ndef default(a=f): pass",
        "from tree.shared import f\nx = lambda f=f: f",
        "from tree.shared import f\nx = [f for f in f()]",
        "from tree.shared import f\ndef annotated(a: f) -> None: pass",
        "from tree.shared import f\nclass A:\n    a: 'list[f]'",
        "from tree.shared import f\nclass A(f): pass",
        "from tree.shared import f\nclass A:\n    f = f",
        "class A:\n    from tree.shared import f",
        "from tree.shared import f\nmatch 1:\n    case f.one: pass",
    ],
)
def test_a_name_is_followed_however_it_is_imported_and_used(tmp_path: Path, start: str) -> None:
    assert reached(tmp_path, start=start, shared=SHARED, deep__far=FAR) == {"shared.f", "deep.far.g", "deep.far.SCALE"}


@pytest.mark.parametrize(
    "start",
    [
        "from tree.shared import f",
        "from tree.shared import f\ndef g(f): return f()",
        "from tree.shared import f\ndef g():\n    f = 1\n    return f",
        "from tree.shared import f\ndef g():\n    for f in (): pass\n    return lambda: f",
        "from tree.shared import f\nx = [f for f in ()]",
        "from tree.shared import f\ndef g():\n    from json import loads as f\n    return f",
        "from tree.shared import f\ndef g():\n    try: pass\n    except OSError as f: return f",
        "from tree.shared import f\ndef g(x):\n    match x:\n        case [f, *_]: return f",
    ],
)
def test_a_name_of_a_functions_own_is_not_the_modules(tmp_path: Path, start: str) -> None:
    assert reached(tmp_path, start=start, shared=SHARED, deep__far=FAR) == set()


@pytest.mark.parametrize(
    "start",
    [
        "import tree.shared as s\ndef g(name): return getattr(s, name)",
        "from tree import shared\nx = [shared]",
        "import importlib\nm = importlib.import_module('tree.shared')",
        "from importlib import import_module\nm = import_module('.shared', __package__)",
        "from tree.shared import *",
        "def g():\n    from importlib import import_module\n    return import_module('tree.shared').f",
    ],
)
def test_a_module_used_as_a_value_counts_whole(tmp_path: Path, start: str) -> None:
    whole = {"shared.f", "shared.other", "shared.LIMIT", "deep.far.g", "deep.far.SCALE"}
    assert reached(tmp_path, start=start, shared=SHARED, deep__far=FAR) == whole


@pytest.mark.parametrize("look_up", ["globals()[name]()", "sys.modules[__name__]", "eval(name)"])
def test_what_looks_names_up_at_run_time_counts_with_its_whole_module(tmp_path: Path, look_up: str) -> None:
    shared = f"import sys\ndef f(name): return {look_up}\ndef other(): return 1"
    assert reached(tmp_path, start="from tree.shared import f\nx = f", shared=shared) == {"shared.f", "shared.other"}


def test_a_package_may_pass_names_on_and_may_have_a_function_of_its_modules_name(tmp_path: Path) -> None:
    files = {
        "start": "from tree.tools import read\nx = read()",
        "tools__init": "from tree.tools.read import read\nfrom tree.tools.write import write",
        "tools__read": "def read(): return step()\ndef step(): return 1\ndef beside(): return 2",
        "tools__write": "def write(): return 1",
    }
    assert reached(tmp_path, **files) == {"tools.read.read", "tools.read.step"}


LAZY = """
    def __getattr__(name):
        if name == "Heavy":
            from tree.zoo.heavy import Heavy
            return Heavy
        if name == "tiny":
            import tree.zoo.tiny as found
            return found
        raise AttributeError(name)

    def load(): return len([])
"""


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("from tree import zoo\nx = zoo.Heavy", {"zoo.__getattr__", "zoo.heavy.Heavy"}),
        ("from tree.zoo import Heavy\nx = Heavy", {"zoo.__getattr__", "zoo.heavy.Heavy"}),
        ("from tree import zoo\nx = zoo.tiny.build", {"zoo.__getattr__", "zoo.tiny.build", "zoo.tiny.other"}),
        ("from tree import zoo\nx = zoo.load()", {"zoo.load"}),
    ],
)
def test_a_modules_getattr_is_followed_for_the_name_asked_for(tmp_path: Path, start: str, expected: set[str]) -> None:
    tiny = "def build(): return 1\ndef other(): return 2"
    files = {"start": start, "zoo__init": LAZY, "zoo__tiny": tiny, "zoo__heavy": "class Heavy: pass"}
    assert reached(tmp_path, **files) == expected


def test_circles_end_and_relative_imports_climb(tmp_path: Path) -> None:
    files = {
        "start": "from .b.other import f\nx = f",
        "b__other": "from ..c.leaf import g\nfrom ..start import x\ndef f(): return g, x, f",
        "c__leaf": "from ..b import other\ndef g(): return other.f",
    }
    assert reached(tmp_path, **files) == {"b.other.f", "c.leaf.g"}


def test_the_papers_own_module_counts_whole_and_other_packages_do_not(tmp_path: Path) -> None:
    start = "import json, numpy\nfrom treehouse import x\nA = 1\ndef unused(): return json\nclass B: pass"
    tree = package(tmp_path, {"start.py": start})
    assert set(fingerprint.code("tree.start", tree)) == {"tree.start.A", "tree.start.unused", "tree.start.B"}


def test_whoever_uses_a_package_as_a_value_reaches_what_it_passes_on(tmp_path: Path) -> None:
    tree = package(tmp_path, {"tools/__init__.py": "from tree.tools.read import f", "tools/read.py": "def f(): pass"})
    assert fingerprint.code("tree.tools", tree) == {}
    assert set(fingerprint.reached("tree.tools", package=tree)) == {"tree.tools.read.f"}
    assert set(fingerprint.reached("tree.tools.f", "json", package=tree)) == {"tree.tools.read.f"}


# --- which edits are seen ---

START = """
    from tree.shared import Model, LIMIT, f
    from tree import tools

    def experiment(): return f(LIMIT), Model(), tools.measure()
"""
FILES = {
    "start.py": START,
    "tools/__init__.py": "from tree.tools.inner import measure, spare",
    "tools/inner.py": "def measure(): return 1\ndef spare(): return 2",
    "shared.py": """
        from tree.far import wrap, g

        LIMIT = 3
        UNUSED = 4

        @wrap
        def f(x): return g(x)

        def unused(): return UNUSED

        class Model:
            width = 8
            def forward(self): return h(self)

        def h(x): return x
    """,
    "far.py": """
        import numpy as np
        def wrap(f): return f
        def g(x):
            from tree.late import last
            return last(np.abs(x))
        def h(x): return -x
    """,
    "late.py": "def last(x): return x\nprint('loaded')",
}


def edited(folder: Path, file: str, old: str, new: str) -> set[str]:
    """Which names of `tree.start`'s key change with an edit."""
    tree = package(folder, FILES)
    before = fingerprint.code("tree.start", tree)
    text = (tree / file).read_text()
    assert text.count(old) == 1
    (tree / file).write_text(text.replace(old, new))
    after = fingerprint.code("tree.start", tree)
    return {name.removeprefix("tree.") for name in {*before, *after} if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("shared.py", "return UNUSED", "return -UNUSED"),
        ("shared.py", "UNUSED = 4", "UNUSED = 5"),
        ("far.py", "return -x", "return x"),
        ("tools/inner.py", "return 2", "return 3"),
        ("shared.py", "LIMIT = 3", "LIMIT = (3)  # at most"),
        ("shared.py", "def h(x): return x", 'def h(x):\n    """Returns it."""\n    return x\n\ndef new(): return h'),
        ("shared.py", "import wrap, g", "import g, wrap"),
        ("tools/__init__.py", "measure, spare", "measure"),
        ("far.py", "    return last", "\n    return last"),
    ],
)
def test_an_edit_of_what_is_not_reached_or_does_nothing_leaves_the_key(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    assert edited(tmp_path, file, old, new) == set()


@pytest.mark.parametrize(
    ("file", "old", "new", "names"),
    [
        ("shared.py", "return g(x)", "return g(-x)", {"shared.f"}),
        ("shared.py", "LIMIT = 3", "LIMIT = 4", {"shared.LIMIT"}),
        ("shared.py", "width = 8", "width = 9", {"shared.Model"}),
        ("shared.py", "def h(x): return x", "def h(x): return 2 * x", {"shared.h"}),
        ("shared.py", "@wrap", "", {"shared.f", "far.wrap"}),
        ("far.py", "def wrap(f): return f", "def wrap(f): return abs", {"far.wrap"}),
        ("far.py", "import numpy as np", "import torch as np", {"far.g"}),
        ("late.py", "return x", "return -x", {"late.last"}),
        ("late.py", "print('loaded')", "print('read')", {"late"}),
        ("tools/inner.py", "return 1", "return 3", {"tools.inner.measure"}),
        ("tools/__init__.py", "measure, spare", "measure\nmeasure.fast = True", {"tools"}),
        ("shared.py", "def h(x): return x", "from tree.far import h", {"shared.h", "far.h"}),
        ("start.py", "f(LIMIT)", "f(2)", {"start.experiment", "shared.LIMIT"}),
    ],
    ids=[
        "two hops away",
        "a constant",
        "an attribute of a class",
        "what a method calls",
        "a decorator taken away",
        "a decorator",
        "another package under the same name",
        "an import inside a function",
        "a statement that does something",
        "through a package that passes it on",
        "a new statement that does something",
        "another function under the same name",
        "the paper's own",
    ],
)
def test_an_edit_of_what_is_reached_changes_the_key_and_is_named(
    tmp_path: Path, file: str, old: str, new: str, names: set[str]
) -> None:
    assert edited(tmp_path, file, old, new) == names


def test_what_a_module_does_when_it_is_imported_counts_although_none_of_its_names_is_used(tmp_path: Path) -> None:
    files = {
        "start": "import tree.side.one",
        "side__init": "from tree.side import beside\nTABLE = {}",
        "side__one": "import json\nif json:\n    json.loads = None",
        "side__beside": "from tree.deep import setting\nsetting.apply()\ndef unused(): return 1",
        "deep__setting": "def apply(): return LEVEL\nLEVEL = 1\ndef unused(): return 2",
    }
    assert reached(tmp_path, **files) == {"side.one", "side.beside", "deep.setting.apply", "deep.setting.LEVEL"}


def test_a_definition_that_one_of_the_packages_decorators_may_register_counts(tmp_path: Path) -> None:
    files = {
        "start": "from tree import methods\nx = methods.known()",
        "methods": """
            import functools
            KNOWN = {}
            def register(f):
                KNOWN[f.__name__] = f
                return f
            @register
            def one(): return 1
            @functools.cache
            def other(): return 2
            def known(): return KNOWN
        """,
    }
    names = {"methods.KNOWN", "methods.known", "methods.one", "methods.register"}
    assert reached(tmp_path, **files) == names


# --- assets ---

ASSETS = {
    "start.py": "from tree import data\n\ndef experiment(): return data.load('one')",
    "assets.py": "def by_revision(f): return f",
    "data/__init__.py": """
        from tree.assets import by_revision
        from tree.data import one, other

        SOURCES = {"one": one.make}

        def load(name): return find(name)()

        @by_revision
        def find(name): return SOURCES[name]
    """,
    "data/one.py": "def make(): return clean(1)\ndef clean(x): return x",
    "data/other.py": "def make(): return 2",
}


def test_the_key_stops_where_an_asset_is_found_by_its_name(tmp_path: Path) -> None:
    tree = package(tmp_path, ASSETS)
    before = fingerprint.code("tree.start", tree)
    assert set(before) == {"tree.start.experiment", "tree.data.load"}
    init = tree / "data/__init__.py"
    init.write_text(init.read_text().replace("one.make}", "one.make, 'other': other.make}"))
    (tree / "data/one.py").write_text("def make(): return clean(2)\ndef clean(x): return x")
    assert fingerprint.code("tree.start", tree) == before


def test_an_edit_of_how_an_asset_is_made_changes_its_fingerprint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package(tmp_path, ASSETS).parent))
    tree = tmp_path / "tree"
    from tree.data import one, other  # type: ignore[import-not-found]

    def prints() -> list[str]:
        return [fingerprint.made_by(module.make, package=tree) for module in (one, other)]

    before = prints()
    (tree / "data/one.py").write_text("def make(): return clean(1)\ndef clean(x): return x + 1")
    after = prints()
    assert before[0] != after[0]
    assert before[1] == after[1]
    for module in [name for name in sys.modules if name.split(".")[0] == "tree"]:
        del sys.modules[module]


def test_arguments_held_ready_and_variables_of_an_inner_function_count() -> None:
    kept = functools.partial(rated_sentences.kept, "movies", rated_sentences.movies, "1")
    others = [
        functools.partial(rated_sentences.kept, "movies", rated_sentences.movies, "2"),
        functools.partial(rated_sentences.kept, "movies", rated_sentences.sources, "1"),
        functools.partial(rated_sentences.kept, "movies", make=rated_sentences.movies, revision="1"),
    ]

    def labelled(label: str) -> Callable[[], str]:
        return lambda: label

    makers = [kept, *others, labelled("a"), labelled("b"), rated_sentences.movies]
    assert len({fingerprint.made_by(maker) for maker in makers}) == len(makers)
    assert fingerprint.made_by(kept) == fingerprint.made_by(functools.partial(kept))


def test_a_function_without_a_name_counts_as_the_definition_it_is_written_in(tmp_path: Path) -> None:
    tree = package(tmp_path, {"start.py": "K = 1\n\nMAKE = {'a': (\n    lambda: K)}"})
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nimport tree.start\n"
        "from midstream.fingerprint import made_by\n"
        "print(made_by(tree.start.MAKE['a'], package=Path(sys.argv[1], 'tree')))"
    )

    def told() -> str:
        command = [sys.executable, "-c", program, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    before = told()
    (tree / "start.py").write_text("K = 2\n\nMAKE = {'a': (\n    lambda: K)}")
    assert told() != before


# --- the real tree ---


@pytest.fixture(scope="module")
def label_words() -> set[str]:
    return set(fingerprint.code(LABEL_WORDS))


@pytest.mark.parametrize(
    "name",
    [
        f"{LABEL_WORDS}.saliency",
        f"{LABEL_WORDS}.CLAIMS",
        "midstream.hooks.attend.attend",
        "midstream.hooks.attend._edited_attention",
        "midstream.hooks.attend",
        "midstream.hooks.sites.sites",
        "midstream.hooks.kv.select",
        "midstream.measure.icl.score",
        "midstream.hooks.kv.expand",
        "midstream.zoo.load",
        "midstream.zoo.loaded.load_folder",
        "midstream.data.load",
        "midstream.claims.direction",
    ],
)
def test_label_words_reaches_what_its_method_uses(label_words: set[str], name: str) -> None:
    assert name in label_words


@pytest.mark.parametrize(
    "beginning",
    [
        "midstream.hooks.prune",
        "midstream.hooks.write",
        "midstream.hooks.kv.kv",
        "midstream.data.corpora",
        "midstream.data.rated_sentences",
        "midstream.data._SOURCES",
        "midstream.zoo.packaged",
        "midstream.zoo.tiny",
        "midstream.zoo.organisms",
        "midstream.train",
        "midstream.fingerprint",
        "midstream.records",
        "midstream.figures",
    ],
)
def test_label_words_does_not_reach_other_methods_data_and_models(label_words: set[str], beginning: str) -> None:
    assert [name for name in label_words if f"{name}.".startswith(f"{beginning}.")] == []


def test_every_data_sets_revision_tells_where_it_is_from_and_how_it_is_made() -> None:
    revisions = {name: data.revision(name) for name in data.NAMES}
    assert all(len(each.rpartition("+")[2]) == fingerprint.DIGITS for each in revisions.values())
    assert len(set(revisions.values())) == len(revisions)
    assert revisions["movies"].startswith(f"{rated_sentences.ARCHIVE.sha256}+")


def test_how_another_data_set_is_made_leaves_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> tuple[str, str]:
        return data.revision("digits"), data.revision("udhr")

    before = both()
    # as an edit of `digits` would: another function makes the rows
    monkeypatch.setitem(data._SOURCES, "digits", dataclasses.replace(corpora.DIGITS, rows=corpora.stdlib))
    assert both()[0] != before[0]
    assert both()[1] == before[1]


def test_tiny_models_and_packaged_ones_are_identified_with_the_code_that_makes_them() -> None:
    smollm2 = zoo.packaged.PACKAGED["smollm2"]
    assert zoo.revision("smollm2") == f"{smollm2.sha256}+{fingerprint.made_by(smollm2.make)}"
    assert zoo.revision("tiny:llama") != zoo.revision("tiny:opt")


def test_a_second_look_takes_milliseconds() -> None:
    fingerprint.code(LABEL_WORDS)
    started = time.perf_counter()
    fingerprint.code(LABEL_WORDS)
    assert time.perf_counter() - started < 0.2


# --- the fingerprint itself ---

EVERY_SYNTAX = '''
"""Docstring."""
from dataclasses import dataclass

@dataclass
class Pair:
    """Docstring."""
    one: int | None = None
    """Docstring."""

async def f(a, /, b=1.5, *rest: "str", c=b"x", **more) -> dict[str, int]:
    def g(): "Docstring."
    text = f"{a!r:>{b}} and " "more" f"{{{c}}}" f"so {b=} {c = !r:^{a}}{a:{b}.{c}}" f""
    match a:
        case {"x": [1, *_], **others} if b: yield 1j
        case None | True: pass
    try: x = {**more, "k": ...}
    except* ValueError: x = lambda *y: (z := y)
'''


def test_the_fingerprint_is_the_same_under_every_python() -> None:
    """The constant was computed once and holds on 3.11, 3.12 and 3.13."""
    assert fingerprint.fingerprint(ast.parse(EVERY_SYNTAX)) == "f2eff3cada07d8b1"

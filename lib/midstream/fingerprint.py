"""What code an experiment reaches, and fingerprints of it that comments and docstrings do not change.

Definitions are followed by name, without importing anything. A paper reaches every top-level definition (function,
class or assignment) of its own module, every definition of Midstream that one of these refers to, and so on. It gets
there however the name is imported: at the top or inside a function, under another name, through a package that passes
it on, through a module's `__getattr__`, as an attribute of a module. What is not certain counts:

- A class counts whole. A module that is used as a value, and not only for its attributes, counts whole.
- Statements that do something when a module is imported count for every module that is imported on the way, and so do
  definitions under a decorator of Midstream's own.
- A definition that looks names up at run time (`globals()`, `sys.modules`, `eval`) counts with its whole module.

The walk stops at functions marked `assets.by_revision`, which find, describe or identify an asset by its name: another
data set or model must not make the records of papers that do not load it stale. In exchange an asset that code makes
has a revision with the fingerprint of that code in it, by `made_by`.

Not seen: methods that are called by a name made up at run time, and code of other packages, whose versions a record
states.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from midstream import syntax
from midstream.assets import by_revision
from midstream.syntax import Contents, Reference, References, Target, is_bare_string

PACKAGE = Path(__file__).resolve().parent
DIGITS = 16


def code(module: str, package: Path = PACKAGE) -> dict[str, str]:
    """Fingerprints of what a module reaches, by dotted name: its own definitions and all that they refer to."""
    walk = _Walk(package)
    if found := walk.module(module):
        walk.import_(module)
        for name in found.contents.definitions:
            walk.reach(found, name)
    return walk.result()


def reached(*names: str, package: Path = PACKAGE) -> dict[str, str]:
    """The same for whoever uses these dotted names as values; a module is then reached with all that is in it."""
    walk = _Walk(package)
    for name in names:
        walk.import_(name)
        first, *rest = parts = name.split(".")
        longest = next((end for end in range(len(parts), 0, -1) if walk.module(".".join(parts[:end]))), 0)
        walk.follow(Target(".".join(parts[:longest])), tuple(parts[longest:]))
        walk.follow(Target(first), tuple(rest))  # not the same where a package has a function of its module's name
    return walk.result()


@by_revision
def made_by(*makers: Any, package: Path = PACKAGE) -> str:
    """One fingerprint of all code that some functions of Midstream reach, for the revision of what they make.

    Of a `functools.partial` its arguments count too, and of an inner function the variables it holds; these are to be
    plain data or functions again.
    """
    walk = _Walk(package)
    facts: list[str] = []
    waiting, seen = list(makers), set()
    while waiting:
        maker = waiting.pop(0)
        if isinstance(maker, functools.partial):
            facts += maker.keywords
            waiting += [maker.func, *maker.args, *maker.keywords.values()]
        elif not hasattr(maker, "__qualname__"):
            facts.append(repr(maker))
        elif id(maker) not in seen:
            seen.add(id(maker))
            facts.append(walk.make(maker))
            waiting += [cell.cell_contents for cell in getattr(maker, "__closure__", None) or ()]
            waiting += [maker.__self__] if inspect.ismethod(maker) else []
    return _digest(json.dumps([facts, walk.result()]))


@by_revision
def with_code(origin: str, *makers: Any) -> str:
    """The revision of an asset that code makes of something with a revision of its own."""
    return f"{origin}+{made_by(*makers)}"


# ---------------------------------------------------------------- the walk


class _Module:
    """A module as it was read: what it defines, and of each definition its fingerprint and what it refers to."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.is_package = path.name == "__init__.py"
        home = name if self.is_package else name.rpartition(".")[0]
        self.contents: Contents = syntax.contents(ast.parse(path.read_text(encoding="utf-8"), str(path)), home)
        self._pieces: dict[str, tuple[str, References]] = {}

    def piece(self, name: str) -> tuple[str, References]:
        """A definition's fingerprint and references; of the empty name, those of statements that do something."""
        if name not in self._pieces:
            statements = self.contents.definitions[name] if name else self.contents.effects
            found = syntax.references(statements, self.contents.home)
            text = _canonical(statements) + "".join(sorted(self._outside(found)))
            self._pieces[name] = _digest(text), found
        return self._pieces[name]

    def _outside(self, found: References) -> Iterator[str]:
        """What the names stand for that come from other packages: `f` of one is not `f` of another."""
        for name in {reference.path[0] for reference in found.found if reference.target is None}:
            for target in self.contents.imports.get(name, ()):
                if target.module.partition(".")[0] != self.name.partition(".")[0]:
                    yield f"\n{name}={target.module}:{target.name}"

    def is_marked(self, name: str) -> bool:
        """Whether the walk for a key stops at this definition."""
        return any(syntax.identifier(each) == by_revision.__name__ for each in self._decorators(name))

    @functools.cached_property
    def decorated(self) -> dict[str, References]:
        """The decorated definitions, each with what its decorators refer to."""
        found = {name: [ast.Expr(each) for each in self._decorators(name)] for name in self.contents.definitions}
        return {name: syntax.references(each, self.contents.home) for name, each in found.items() if each}

    def around(self, line: int) -> str:
        """The definition that a line of the file is in; empty outside of all."""
        for name, statements in self.contents.definitions.items():
            if any(each.lineno <= line <= (each.end_lineno or 0) for each in statements):
                return name
        return ""

    def _decorators(self, name: str) -> list[ast.expr]:
        return [each for node in self.contents.definitions[name] for each in getattr(node, "decorator_list", [])]


@functools.cache
def _read(name: str, path: Path, changed: int, size: int) -> _Module:
    """A module; the state of its file tells an edited one from the one read before."""
    return _Module(name, path)


_RUNTIME = {("globals",), ("vars",), ("locals",), ("eval",), ("exec",), ("__import__",), ("sys", "modules")}
"""What looks names up at run time."""


class _Walk:
    """Follows names from definition to definition, and keeps the fingerprint of each that it has reached."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self._found: dict[str, str] = {}
        self._modules: dict[str, _Module | None] = {}
        self._seen: set[tuple[str, ...]] = set()
        self._waiting: list[tuple[_Module, References]] = []

    def result(self) -> dict[str, str]:
        """Fingerprints by dotted name; under a module's own name that of its statements that do something."""
        while self._waiting:
            module, found = self._waiting.pop()
            for name in found.imported:
                self.import_(name)
            for reference in found.found:
                self._refer(module, reference)
        return dict(sorted(self._found.items()))

    def module(self, name: str) -> _Module | None:
        """The module of a dotted name, or None where there is no such module in the package."""
        if name not in self._modules:
            path = _source(name, self.package)
            state = path.stat() if path else None
            self._modules[name] = _read(name, path, state.st_mtime_ns, state.st_size) if path and state else None
        return self._modules[name]

    def import_(self, name: str) -> None:
        """Count what importing a module does: in itself, in the packages on the way and in what these import."""
        for each in _with_parents(name):
            module = self.module(each)
            if module is None or not self._is_new("import", each):
                continue
            if module.contents.effects:
                self._keep(module, "")
            for imported in module.contents.imported:
                self.import_(imported)
            for definition, decorators in module.decorated.items():
                if any(self._is_own(module, reference) for reference in decorators.found):
                    self.reach(module, definition)

    def _is_own(self, module: _Module, reference: Reference) -> bool:
        """Whether a name stands for something of this package."""
        if reference.target:
            return self.module(reference.target.module) is not None
        name = reference.path[0]
        targets = module.contents.imports.get(name, ())
        return name in module.contents.definitions or any(self.module(target.module) for target in targets)

    def reach(self, module: _Module, name: str, marked: bool = False) -> None:
        """Count a definition and wait to follow what it refers to."""
        if name not in module.contents.definitions or (module.is_marked(name) and not marked):
            return
        if self._is_new("definition", module.name, name):
            self.import_(module.name)
            self._keep(module, name)

    def make(self, maker: Any) -> str:
        """Count the top-level definition that a function or class is, or is written in, marked or not; say which."""
        maker = inspect.unwrap(maker)
        name = maker.__qualname__.partition(".")[0]
        if module := self.module(maker.__module__ or ""):
            self.import_(module.name)
            if name == "<lambda>":
                name = module.around(maker.__code__.co_firstlineno)
            self.reach(module, name, marked=True)
        return f"{maker.__module__}.{name}"

    def _keep(self, module: _Module, name: str) -> None:
        digest, found = module.piece(name)
        self._found[f"{module.name}.{name}".rstrip(".")] = digest
        self._waiting.append((module, found))

    def _refer(self, module: _Module, reference: Reference) -> None:
        """Follow a name as code in a module uses it."""
        if reference.target:
            self.follow(reference.target, reference.path)
            return
        name, *chain = reference.path
        if reference.path[:1] in _RUNTIME or reference.path[:2] in _RUNTIME:
            self._reach_all(module)
        self._attribute(module, name, tuple(chain), own=True)

    def follow(self, target: Target, chain: tuple[str, ...]) -> None:
        """Follow what an import bound and the attributes asked of it."""
        if target.module.partition(".")[0] != self.package.name:
            return
        module = self.module(target.module)
        if target.name:
            chain = (target.name, *chain)
        if module and chain:
            self._attribute(module, chain[0], chain[1:])
        elif module:
            self._reach_all(module)
        elif chain:  # a folder without an __init__.py
            self.follow(Target(f"{target.module}.{chain[0]}"), chain[1:])

    def _attribute(self, module: _Module, name: str, chain: tuple[str, ...], own: bool = False) -> None:
        """Follow an attribute of a module: what it defines, imports or makes on demand, or a module inside it."""
        if not self._is_new("attribute", module.name, str(own), name, *chain):
            return
        self.reach(module, name)
        for target in module.contents.imports.get(name, ()):
            self.follow(target, chain)
        if name in module.contents.definitions or name in module.contents.imports:
            return
        if module.is_package:
            inner = f"{module.name}.{name}"
            self.import_(inner)
            self.follow(Target(inner), chain)
        if "__getattr__" in module.contents.definitions and not own:
            self._make_on_demand(module, name)

    def _make_on_demand(self, module: _Module, name: str) -> None:
        """Follow a module's `__getattr__` for one name."""
        self.import_(module.name)
        digest, _ = module.piece("__getattr__")
        self._found[f"{module.name}.__getattr__"] = digest
        branches = [syntax.for_attribute(node, name) for node in module.contents.definitions["__getattr__"]]
        self._waiting.append((module, syntax.references(branches, module.contents.home)))

    def _reach_all(self, module: _Module) -> None:
        """A module used as a value: anything in it may be asked for."""
        self.import_(module.name)
        if self._is_new("whole", module.name):
            for name in [*module.contents.definitions, *module.contents.imports]:
                self._attribute(module, name, ())

    def _is_new(self, *step: str) -> bool:
        if step in self._seen:
            return False
        self._seen.add(step)
        return True


def _source(name: str, package: Path) -> Path | None:
    """The file of a dotted name, or None where there is no such module in the package."""
    head, *rest = name.split(".")
    if head != package.name:
        return None
    base = package.joinpath(*rest)
    for path in (base / "__init__.py", base.with_name(base.name + ".py")):
        if path.is_file() and (rest or path.parent == package):
            return path
    return None


def _with_parents(name: str) -> Iterator[str]:
    """A module after the packages that importing it runs."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


# ---------------------------------------------------------------- fingerprints


def fingerprint(tree: ast.AST) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a syntax tree without its docstrings."""
    return _digest(_canonical(tree))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _canonical(node: object) -> str:
    """A syntax tree as text, the same under every Python version: absent and empty fields are left out."""
    if isinstance(node, list):
        return "[" + ",".join(_canonical(item) for item in node if not is_bare_string(item)) + "]"
    if isinstance(node, ast.Constant):
        return f"{type(node.value).__name__}:{node.value!a}"  # ASCII: what is printable differs too
    if isinstance(node, ast.JoinedStr):
        return "JoinedStr" + _canonical(_merged(node.values))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
    return type(node).__name__ + "(" + ",".join(f"{name}={_canonical(value)}" for name, value in fields) + ")"


def _merged(pieces: list[ast.expr]) -> list[ast.expr]:
    """The pieces of an f-string, neighbouring texts joined and empty ones dropped: Pythons cut them differently."""
    merged: list[ast.expr] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, ast.Constant) and isinstance(last, ast.Constant):
            merged[-1] = ast.Constant(str(last.value) + str(piece.value))
        elif not (isinstance(piece, ast.Constant) and piece.value == ""):
            merged.append(piece)
    return merged

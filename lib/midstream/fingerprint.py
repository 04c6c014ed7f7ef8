"""What code an experiment reaches, and a fingerprint of it that comments and docstrings do not change.

Modules are followed through their import statements without importing them: at the top, inside functions,
relative ones, and `importlib.import_module` of a constant name. Packages that only hold papers, and the root
package with its version number, count only when something is imported *out of* them; every other package on
the way to a module counts, because importing the module runs it.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from midstream.places import PACKAGE

DIGITS = 16


def code(module: str, package: Path = PACKAGE) -> dict[str, str]:
    """Fingerprints of a module and of every module of the same package that it reaches, by dotted name."""
    reached: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name, package)
        if name in reached or path is None:
            continue
        state = path.stat()
        reached[name], imported = _read(name, path, package, (state.st_mtime_ns, state.st_size))
        waiting += imported
    return dict(sorted(reached.items()))


@cache
def _read(name: str, path: Path, package: Path, version: tuple[int, int]) -> tuple[str, tuple[str, ...]]:
    """A file's fingerprint and what it imports; `version` tells an edited file from the one read before."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return fingerprint(tree), tuple(_imports(tree, name, path, package))


def fingerprint(tree: ast.AST) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a syntax tree without its docstrings."""
    return hashlib.sha256(_canonical(tree).encode()).hexdigest()[:DIGITS]


def _canonical(node: object) -> str:
    """A syntax tree as text, the same under every Python version: absent and empty fields are left out."""
    if isinstance(node, list):
        return "[" + ",".join(_canonical(item) for item in node if not _is_bare_string(item)) + "]"
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


def _is_bare_string(node: object) -> bool:
    """Docstrings, and the strings under attributes that serve as such: statements that do nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


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


def _imports(tree: ast.AST, name: str, path: Path, package: Path) -> Iterator[str]:
    """The dotted names that a module imports from its own package, packages on the way included."""
    home = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name, package)
        elif isinstance(node, ast.ImportFrom):
            yield from _from_import(_absolute(node.module or "", node.level, home), node.names, package)
        elif isinstance(node, ast.Call) and (target := _dynamic_import(node)):
            yield from _with_parents(
                _absolute(target.lstrip("."), len(target) - len(target.lstrip(".")), home), package
            )


def _from_import(base: str, names: list[ast.alias], package: Path) -> Iterator[str]:
    """`from base import names`: each name is a module of its own, or else something `base` itself defines."""
    for alias in names:
        inner = f"{base}.{alias.name}"
        if _source(inner, package):
            yield from _with_parents(inner, package)
        else:
            yield base
            yield from _with_parents(base, package)


def _absolute(module: str, level: int, home: str) -> str:
    """A relative import's dotted name; level 1 is the package the module lives in."""
    if level == 0:
        return module
    anchor = home.rsplit(".", level - 1)[0] if level > 1 else home
    return f"{anchor}.{module}" if module else anchor


def _dynamic_import(call: ast.Call) -> str | None:
    """The constant name given to `importlib.import_module`, if this call is one."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    if called == "import_module" and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return None


def _with_parents(name: str, package: Path) -> Iterator[str]:
    """A module and the packages that importing it runs, except the root and those that only hold papers."""
    yield name
    holders = (package.name, f"{package.name}.papers")
    parts = name.split(".")
    for end in range(2, len(parts)):
        parent = ".".join(parts[:end])
        if not parent.startswith(holders[1]):
            yield parent

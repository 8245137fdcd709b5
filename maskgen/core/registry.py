"""Finds extensions (methods, kernels, checks) by name: each is one file in a folder, and called what its file is
called.

The folder may be divided into folders, which are packages; two files of one name, in whichever folders, are an error.
There is no table to edit and nothing is imported before it is used. Names come from users and recipes, so a name is
only ever compared with the files that exist; it never becomes a path.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from maskgen.core.errors import RecipeError, SparseError


def names(package: ModuleType) -> list[str]:
    """Names of the extensions in a package and its folders, sorted; files starting with `_` are helpers.

    Raises `ImportError` when two files have one name.
    """
    return sorted(_modules(package.__name__, package.__path__))


def load(package: ModuleType, name: str, error: type[SparseError] = RecipeError) -> ModuleType:
    """Import one extension; raises `error` listing the known names when there is none called `name`.

    Raises `ImportError` when two files have one name, whichever name is asked for.
    """
    known = _modules(package.__name__, package.__path__)
    if name not in known:
        kind = package.__name__.rpartition(".")[2]
        raise error(f"no {name!r} in {kind}; expected one of {sorted(known)}")
    return importlib.import_module(known[name])


def _modules(package: str, paths: Sequence[str]) -> dict[str, str]:
    """Extension -> full module name. Packages are not imported to look into them."""
    modules: dict[str, str] = {}
    for name, module in _walk(package, paths):
        if name in modules:
            raise ImportError(f"{modules[name]} and {module} are both called {name!r} in a recipe or flag; rename one")
        modules[name] = module
    return modules


def _walk(package: str, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(extension, full module name) of every file of a package and its folders, but for helpers."""
    for info in pkgutil.iter_modules(paths):
        module = f"{package}.{info.name}"
        if info.name.startswith("_"):
            continue
        if info.ispkg:
            yield from _walk(module, [str(Path(path, info.name)) for path in paths])
        else:
            yield info.name, module

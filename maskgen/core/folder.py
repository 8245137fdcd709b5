"""The folder is the registry: one extension is one file, and its file name is its name in a recipe or a flag.

There is no table to edit and nothing is imported before it is used. Names come from users and recipes, so a name is
only ever compared with the files that exist; it never becomes a path.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from maskgen.core.errors import RecipeError, SparseError


def names(package: ModuleType) -> list[str]:
    """Names of the extensions in a package, sorted; files starting with `_` are helpers, not extensions."""
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))


def load(package: ModuleType, name: str, error: type[SparseError] = RecipeError) -> ModuleType:
    """Import one extension; raises `error` listing the known names when there is none called `name`."""
    known = names(package)
    if name not in known:
        kind = package.__name__.rpartition(".")[2]
        raise error(f"no {name!r} in {kind}; expected one of {known}")
    return importlib.import_module(f"{package.__name__}.{name}")

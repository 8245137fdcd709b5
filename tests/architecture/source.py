"""What the architecture tests look at: the repository's files, and the imports of its modules."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("maskgen", "sparse_serve")
GENERATED = "sparse_serve/api/pb/"

_NOT_OURS = {"__pycache__", "build", "dist", ".git", ".venv"}


@cache
def files() -> tuple[str, ...]:
    """Paths of everything that is, or would be, in the repository; without git, everything that does not look built."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        paths = [path for path in listing.split("\0") if path and (ROOT / path).exists()]
    except (OSError, subprocess.CalledProcessError):
        paths = [str(path.relative_to(ROOT)) for path in _walk(ROOT) if path.suffix not in {".pyc", ".so"}]
    return tuple(sorted(paths))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.name not in _NOT_OURS and not path.name.endswith(("_cache", ".egg-info")):
            yield from _walk(path)


def python_files(*folders: str) -> list[str]:
    """Hand-written Python files below the folders."""
    below = tuple(folder + "/" for folder in folders)
    return [path for path in files() if path.endswith(".py") and path.startswith(below) and GENERATED not in path]


@cache
def tree(path: str) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse((ROOT / path).read_text("utf-8"), path)


def module_name(path: str) -> str:
    """`a/b/__init__.py` -> `a.b`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str) -> set[str]:
    """Every module a file imports, anywhere in it; ours by full name, also in `from package import module`."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}:{node.lineno}: relative import"
            found.update(_module(node.module, alias.name) for alias in node.names)
    return found


def _module(package: str, name: str) -> str:
    candidate = f"{package}.{name}".replace(".", "/")
    is_module = (ROOT / f"{candidate}.py").is_file() or (ROOT / candidate).is_dir()
    return candidate.replace("/", ".") if is_module else package

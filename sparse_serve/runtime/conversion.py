"""Sparse models of other tools, made ours before they are served: a copy in the user's cache folder, once.

`maskgen convert` does it, in a process of its own: it needs transformers and the memory of one layer, and a server must
have neither. The copy is `sparse-serve/converted/NAME--KEY` in the folder for caches (see `cache`), where KEY is that
of names, sizes and times of the files it is made of: a file that is written anew is converted anew. Nothing deletes
copies; each takes 0.3 to 0.6 of what the same weights take dense in 16 bits.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from maskgen.core import foreign
from maskgen.core.companions import companion_files
from maskgen.core.config import CONFIG_KEY, FORMAT_VERSION
from maskgen.core.digest import digest_file, digest_json
from sparse_serve.runtime import cache
from sparse_serve.runtime.errors import SettingsError

_MAKER = 1
"""To be raised when conversions of the same files come out differently."""


@dataclass(frozen=True)
class Prepared:
    """What to serve in place of a model: a directory, and what to put over its `config.json`."""

    directory: Path
    overrides: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Conversion:
    """Makes models ours before they are served. `masks` are MaskLLM's for a dense model; `tell` is called with a line
    about what takes time, from the thread that waits for it."""

    masks: Path | None = None
    tell: Callable[[str], None] = lambda line: None

    def is_for(self, source: Path) -> bool:
        """Whether a directory is to be served in another form. Raises `FormatError`."""
        return self.masks is not None or foreign.foreign_kind(source) is not None

    def prepare(self, source: Path, name: str, check: Callable[[], None]) -> Prepared:
        """The directory itself if it is dense or ours, or a copy of it that is, whose own name begins with `name`.

        `check` is called before a copy is made, which may take minutes, and raises what is known to be in its way.
        Raises `SettingsError` with what `maskgen convert` says of a model that is damaged or that it does not know,
        `FormatError`.
        """
        kind = "MaskLLM masks" if self.masks is not None else foreign.foreign_kind(source)
        if kind is None:
            return Prepared(source)
        if kind == foreign.LEFTOVER:
            self.tell(f"{name} has a leftover sparsity_config and no sparse weights: served as it is, without that")
            return Prepared(source, {CONFIG_KEY: foreign.without_leftover(source)})
        copy = _folder() / f"{name}--{_key(source, self.masks)}"
        what = f"{name} is not a checkpoint of ours ({kind})"
        if copy.is_dir():
            self.tell(f"{what}: serving {copy}, made of it before")
            return Prepared(copy)
        check()
        self.tell(f"{what}: converting it into {copy}, once")
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(copy.with_name(f".{copy.name}.making")):
                if not copy.is_dir():
                    _convert(source, self.masks, copy)
        except SettingsError as error:
            if kind != foreign.MASKED:
                raise
            self.tell(f"{error}; served dense, as it is stored")  # zeros in some weights say little of the others
            return Prepared(source)
        return Prepared(copy)


def _convert(source: Path, masks: Path | None, copy: Path) -> None:
    words = ["convert", str(source), "--out", str(copy), *(() if masks is None else ("--masks", str(masks)))]
    # -P: the folder that a server is started in may be a model's, and its files are no modules
    command = [sys.executable, "-P", "-m", "maskgen", *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SettingsError(
            f"{source} could not be converted: {lines[-1].removeprefix('maskgen: error: ')}; --no-convert serves it as "
            "it is, if vLLM can"
        )


def _key(source: Path, masks: Path | None) -> str:
    weights = (*source.glob("*.safetensors"), *source.glob("*.json"))
    files = sorted({source / "config.json", *weights, *companion_files(source)})
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    facts = {
        "directory": str(source.resolve()),
        "files": states,
        "masks": None if masks is None else digest_file(masks),
        "version": [FORMAT_VERSION, _MAKER],
    }
    return digest_json(facts).removeprefix("sha256:")[:16]


def _folder() -> Path:
    try:
        return cache.folder() / "converted"
    except OSError as error:
        raise SettingsError(
            f"no folder for a converted copy: {error}; set XDG_CACHE_HOME, or use maskgen convert"
        ) from None

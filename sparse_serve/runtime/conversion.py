"""Sparse models of other tools, made ours before they are served: a copy in the user's cache folder, once.

`maskgen convert` does it, in a process of its own: it needs transformers and the memory of one layer, and a server must
have neither. The copy is `sparse-serve/converted/NAME--KEY` in the folder for caches (see `cache`), where KEY is that
of names, sizes and times of the files it is made of: a file that is written anew is converted anew. Nothing deletes
copies; each takes 0.3 to 0.6 of what the same weights take dense in 16 bits.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from maskgen.core import foreign
from maskgen.core.companions import companion_files
from maskgen.core.config import FORMAT_VERSION
from maskgen.core.digest import digest_file, digest_json
from sparse_serve.runtime import cache
from sparse_serve.runtime.errors import SettingsError

_MAKER = 1
"""To be raised when conversions of the same files come out differently."""

_NAME_FLAG, _OVERRIDES_FLAG = "--served-model-name", "--hf-overrides"


@dataclass(frozen=True)
class Prepared:
    """What to serve in place of a model: a directory, and flags of vLLM that go with it."""

    model: str
    flags: tuple[str, ...] = ()


def prepare(model: str, masks: Path | None, flags: Sequence[str], tell: Callable[[str], None]) -> Prepared:
    """The model itself if it is dense or ours, or a copy of it that is. `masks` are MaskLLM's for a dense model.

    `flags` are those for vLLM, `tell` is called with a line about what takes time. Raises `SettingsError` with what
    `maskgen convert` says of a model that is damaged or that it does not know, `FormatError`.
    """
    source = Path(model)
    if not source.is_dir():
        if masks is not None:
            raise SettingsError(f"--masks {masks}: for the directory of a dense model, which {model} is not")
        return Prepared(model)
    kind = "MaskLLM masks" if masks is not None else foreign.foreign_kind(source)
    if kind is None:
        return Prepared(model)
    if kind == foreign.LEFTOVER:
        return _without_leftover(source, flags, tell)
    name = source.resolve().name
    copy = _folder() / f"{name}--{_key(source, masks)}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    what = f"{model} is not a checkpoint of ours ({kind})"
    if copy.is_dir():
        tell(f"{what}: serving {copy}, made of it before")
    else:
        tell(f"{what}: converting it into {copy}, once")
        try:
            with filelock.FileLock(copy.with_name(f".{copy.name}.making")):
                if not copy.is_dir():
                    _convert(source, masks, copy)
        except SettingsError as error:
            if kind != foreign.MASKED:
                raise
            tell(f"{error}; served dense, as it is stored")  # zeros in some weights say little of the others
            return Prepared(model)
    return Prepared(str(copy), () if _is_given(_NAME_FLAG, flags) else (_NAME_FLAG, name))


def _without_leftover(source: Path, flags: Sequence[str], tell: Callable[[str], None]) -> Prepared:
    """vLLM refuses the section, whatever it says."""
    if _is_given(_OVERRIDES_FLAG, flags):
        return Prepared(str(source))
    tell(f"{source} has a leftover sparsity_config and no sparse weights: it is served as it is, without that section")
    section = json.dumps({"quantization_config": foreign.without_leftover(source)})
    return Prepared(str(source), (_OVERRIDES_FLAG, section))


def _convert(source: Path, masks: Path | None, copy: Path) -> None:
    words = ["convert", str(source), "--out", str(copy), *(() if masks is None else ("--masks", str(masks)))]
    # -P: the folder that a server is started in may be a model's, and its files are no modules
    command = [sys.executable, "-P", "-m", "maskgen", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with process, _ends_with_this(process):
        _, errors = process.communicate()
    if process.returncode != 0:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        raise SettingsError(
            f"{source} could not be converted: {lines[-1].removeprefix('maskgen: error: ')}; --no-convert serves it as "
            "it is, if vLLM can"
        )


@contextlib.contextmanager
def _ends_with_this(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the process when this one is told to end meanwhile, or is interrupted."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


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


def _is_given(flag: str, flags: Sequence[str]) -> bool:
    """Also in vLLM's form for a part of a value, `--flag.part`."""
    return any(word.partition("=")[0].partition(".")[0].replace("_", "-") == flag for word in flags)

"""GGUF files, the format of llama.cpp: one file -> an ordinary Hugging Face directory, with transformers' own reader.

A GGUF file holds a whole model: its sizes, tokenizer and chat template, and its weights, most of them quantised in
blocks. The directory holds the *dequantised* weights, rounded to bfloat16. They are not those that were quantised: what
that cost is not undone, and a perplexity measured here is that of the file, not of the model it was made from.

`converted` keeps what it makes in the user's cache folder, under the digest of the file and the versions of the
readers, so a file is converted once, and again by a newer reader. Several processes may ask at the same time: one
converts, the others wait for it.

Split files (`-00001-of-00003.gguf`), adapters and vision towers are refused by name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import torch
import transformers
from platformdirs import user_cache_path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from maskgen.core.digest import digest_file, digest_json
from maskgen.core.errors import FormatError, ModelError, SparseError, clip
from maskgen.core.failures import TEMPORARY_SUFFIX, explained, machine_failure
from maskgen.core.files import fsync_path
from maskgen.hf import gguf_tokenizer
from maskgen.hf.errors import HF_ERRORS, clear_errors, first_line
from maskgen.hf.gguf_tokenizer import PRE_TOKENIZER

MAGIC = b"GGUF"
_READERS = ("gguf", "accelerate")
_ADD_BOS, _ADD_EOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
_FACTS = (
    "general.architecture",
    "general.type",
    "split.count",
    "tokenizer.ggml.model",
    PRE_TOKENIZER,
    _ADD_BOS,
    _ADD_EOS,
)
_VERSION = 2
"""Of the directories that are made; another one is made anew."""
_SOURCE = "; start from the model's Hugging Face directory instead"


@dataclass(frozen=True)
class _Header:
    """What a file says of itself: architecture, how its tokenizer cuts words, which tokens it puts around a text."""

    architecture: str
    words: str = ""
    around: dict[str, bool] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """Whether a file means to be GGUF, by its first bytes or its name; False for anything that is no file."""
    return path.is_file() and (path.suffix.lower() == ".gguf" or _magic(path) == MAGIC)


def cache_folder() -> Path:
    """This project's folder in the user's cache directory. Raises `SparseError` for a user without a home directory."""
    try:
        folder = user_cache_path("sparse-serve")
    except RuntimeError as error:
        raise SparseError(f"no folder for caches: {error}; set XDG_CACHE_HOME to one") from None
    if not folder.is_absolute():  # older releases of platformdirs leave `~` in it
        raise SparseError(f"no folder for caches: {folder} is not absolute; set XDG_CACHE_HOME to one that is")
    return folder


def converted(path: Path, tell: Callable[[str], None]) -> Path:
    """The directory made from a GGUF file, in the user's cache folder; converted now if it is not there yet.

    `tell` is called with what begins, such as "converting x.gguf". Raises what `convert` does.
    """
    tell(f"reading {path.name}")
    folder = cache_folder() / "gguf"
    versions = {name: metadata.version(name) for name in ("transformers", *_READERS) if importlib.util.find_spec(name)}
    key = digest_json({"file": digest_file(path), "readers": versions, "version": _VERSION}).removeprefix("sha256:")[
        :16
    ]
    out = folder / f"{path.stem}--{key}"
    if out.is_dir():
        return out
    _check_packages(path)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f".{out.name}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        tell(f"waiting for the process that converts {path.name}")
        lock.acquire()
    try:
        if not out.is_dir():
            tell(f"converting {path.name}")
            # a process that was killed may have left a part: nobody else holds the lock now
            for part in folder.glob(f".{out.name}.*{TEMPORARY_SUFFIX}"):
                shutil.rmtree(part, ignore_errors=True)
            convert(path, out)
    finally:
        lock.release()
    return out


def convert(path: Path, out: Path) -> None:
    """Write the model of a GGUF file as the Hugging Face directory `out`, which must not exist.

    bfloat16 weights, config, generation config, tokenizer and chat template; whole or not at all. Raises `FormatError`
    (no GGUF file, damaged, cut off), `ModelError` (transformers cannot read this architecture from GGUF), `SparseError`
    (a package is missing), `StorageError` (a full disk).
    """
    _check_packages(path)
    header = _read_header(path)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "trust_remote_code": False}
    what = f"transformers {transformers.__version__} cannot read the architecture {header.architecture!r} from GGUF"
    with clear_errors(path, what, _SOURCE):
        config = AutoConfig.from_pretrained(**source)
    with clear_errors(path, "transformers cannot convert it", _SOURCE), _without_bars():
        tokenizer = AutoTokenizer.from_pretrained(**source, **header.around)
        gguf_tokenizer.correct(tokenizer, header.words)
        model, info = AutoModelForCausalLM.from_pretrained(
            **source,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    _check_weights(path, model, info["missing_keys"])
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with explained(out):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for file in temporary.iterdir():
                file.chmod((temporary / "config.json").stat().st_mode)  # safetensors lets nobody else read its files
                fsync_path(file)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_packages(path: Path) -> None:
    """`SparseError` unless everything that the reader needs is installed."""
    lacking = [name for name in _READERS if importlib.util.find_spec(name) is None]
    if not hasattr(transformers, "GgufConfig"):
        lacking.append("transformers 5.19 or newer")
    if lacking:
        raise SparseError(
            f"{path}: reading GGUF needs {' and '.join(lacking)}, not installed: pip install 'sparse-serve[gguf]'"
        )


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def _read_header(path: Path) -> _Header:
    """Read what the file says of itself, and check that all of its tensors are inside it."""
    if _magic(path) != MAGIC:
        raise FormatError(
            f"{path}: not a GGUF file: starts with {clip(_magic(path))}, expected {MAGIC!r}; download it again"
        )
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        facts = {name: fields[name].contents() for name in _FACTS if name in fields}
        architecture = str(facts["general.architecture"])
    except HF_ERRORS as error:
        if (failure := machine_failure(error)) is not None:
            raise failure from None
        size = path.stat().st_size
        raise FormatError(
            f"{path}: damaged or cut off GGUF file of {size:,} bytes ({first_line(error)}); download it again"
        ) from None
    kind, parts = facts.get("general.type", "model"), facts.get("split.count", 1)
    if kind != "model":
        raise ModelError(f"{path}: holds {clip(kind)}, expected a model")
    if parts > 1:
        raise ModelError(f"{path}: one of {parts} parts; join them with `llama-gguf-split --merge`")
    # llama.cpp's SentencePiece models start every text with BOS unless they say otherwise
    around = {"add_bos_token": facts.get("tokenizer.ggml.model") == "llama"}
    for key in (_ADD_BOS, _ADD_EOS):
        if key in facts:
            around[key.rpartition(".")[2]] = bool(facts[key])
    return _Header(architecture, str(facts.get(PRE_TOKENIZER, "")), around)


def _check_weights(path: Path, model: Any, missing: Collection[str]) -> None:
    """Raise unless every weight came from the file, in the shape that the header implies, and is a number."""
    if missing:
        raise FormatError(f"{path}: {len(missing)} tensors are missing, such as {min(missing)}; download it again")
    with clear_errors(path), torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    for name, weight in model.state_dict().items():
        if weight.shape != expected[name].shape:
            shapes = f"{tuple(weight.shape)}, expected {tuple(expected[name].shape)}"
            raise FormatError(f"{path}: {name} has the shape {shapes}, by the file's header; download it again")
        if not bool(weight.isfinite().all()):
            raise FormatError(f"{path}: {name} holds NaN or infinity: a damaged file; download it again")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws a bar on stderr while it converts that none of its settings turn off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield

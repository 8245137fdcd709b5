"""Digests: the links of the provenance chain, always written `sha256:<64 hex digits>`.

GateReport -> SparseCheckpoint -> MaskSet -> recipe -> base model + data, one digest each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core.errors import FormatError, clip

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_bytes(data: bytes) -> str:
    """Digest of a byte string."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON-serialisable value, independent of key order and white space."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def digest_tensors(header: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of named tensors in the order given: header, then name, dtype, shape and little-endian bytes of each."""
    state = hashlib.sha256(header.encode())
    for name, tensor in tensors:
        state.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return "sha256:" + state.hexdigest()


def digest_file(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """Digest of files by content, keyed by their names; the order given does not matter."""
    state = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        state.update(f"{path.name} {digest_file(path).removeprefix('sha256:')}\n".encode())
    return "sha256:" + state.hexdigest()


def digest_weights(model_dir: Path | str) -> str:
    """Digest of a model's safetensors files; `FormatError` when the directory holds none."""
    paths = list(Path(model_dir).glob("*.safetensors"))
    if not paths:
        raise FormatError(f"{model_dir}: no *.safetensors files; convert the model with save_pretrained first")
    return digest_files(paths)


@dataclass(frozen=True)
class StoredModel:
    """Size and time of the last change of a model's config and weights, by file, to notice that they were replaced."""

    model_dir: Path
    files: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, model_dir: Path) -> StoredModel:
        """As it is now."""
        paths = [model_dir / "config.json", *model_dir.glob("*.safetensors")]
        states = {path.name: path.stat() for path in paths if path.exists()}
        return cls(model_dir, {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()})

    def check(self) -> None:
        """`FormatError` if a file was changed, added or removed since."""
        now = StoredModel.of(self.model_dir).files
        for name in sorted(self.files.keys() | now.keys()):
            if self.files.get(name) != now.get(name):
                raise FormatError(
                    f"{self.model_dir / name}: changed while the run was at work, so its result would be of two "
                    "models; run again on a model that stays as it is"
                )


def derive_seed(*parts: int) -> int:
    """A generator seed below 2^60 that is unrelated for every different tuple of numbers."""
    return int(digest_json(parts)[len("sha256:") :][:15], 16)


def check_digest(text: Any, name: str) -> str:
    """Return `text` if it is a digest, else raise `FormatError`."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise FormatError(f"{name}: {clip(text)} is not a digest of the form sha256:<64 hex digits>")
    return text

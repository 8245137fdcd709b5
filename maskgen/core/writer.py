"""Writing a Hugging Face safetensors directory: streamed, sharded, atomic.

Tensors are added one at a time and leave memory when their shard is full, so the peak is one shard. Everything goes
into a hidden sibling directory that becomes the real one by a single rename after all of it is on disk: a writer that
is killed leaves `.<name>.partial` behind, never a directory that opens. The next writer of the same output deletes it;
a lock makes sure that two running writers never share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from maskgen.core.checkpoint import INDEX_NAME, SINGLE_NAME
from maskgen.core.companions import SETTINGS_FILE
from maskgen.core.config import is_sparse_config, with_shards
from maskgen.core.digest import digest_file
from maskgen.core.errors import OutputExistsError
from maskgen.core.failures import TEMPORARY_SUFFIX, explained
from maskgen.core.files import fsync_path, save_tensors
from maskgen.core.settings import SettingsRecord

SHARD_BYTES = 5_000_000_000
"""Default shard size, as `save_pretrained` uses."""


class CheckpointWriter:
    """Context manager: `add` tensors, and on a clean exit `out_dir` exists, whole.

    `config` becomes `config.json`, and that of a sparse checkpoint gets the digests of the shards. `files` are copied
    beside it (tokenizer and the like), `extra` maps file names to JSON values, or to paths of files to copy. A sparse
    checkpoint gets the record of all these (`settings`), too. Raises
    `OutputExistsError` if `out_dir` exists or another process is writing it, and `StorageError` (a full disk) that
    leaves no output.
    """

    def __init__(
        self,
        out_dir: Path | str,
        config: Mapping[str, Any],
        files: Iterable[Path] = (),
        extra: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.out_dir = Path(out_dir).resolve()
        self._config, self._json = config, dict(extra or {})
        self._files = list(files)
        self._shard_bytes = shard_bytes
        self._partial = self.out_dir.with_name(f".{self.out_dir.name}{TEMPORARY_SUFFIX}")
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self.total_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        with explained(self.out_dir), contextlib.ExitStack() as undo:
            self._check_free()
            self._acquire(undo)
            for leftover in self._partial.iterdir():
                leftover.unlink()
            self._undo = undo.pop_all()
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; its shard is written as soon as it is full."""
        assert name not in self._names, f"{name} was added before"
        self._names.add(name)
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            with explained(self.out_dir):
                self._write_shard()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._undo:
            if kind is None:
                with explained(self.out_dir):
                    self._finish()

    def _check_free(self) -> None:
        if self.out_dir.exists():
            raise OutputExistsError(f"{self.out_dir} exists; remove it or choose another output directory")

    def _acquire(self, undo: contextlib.ExitStack) -> None:
        """Lock the hidden directory. `undo` gets what unlocks it, and removes it with all that is in it, if it still
        has its hidden name.

        Raises `OutputExistsError` if another writer has it, or renamed it between our opening and locking it.
        """
        try:
            lock = self._open()
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(lock), self._partial.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise OutputExistsError(f"{self.out_dir}: another process is writing it; choose another output")
        undo.callback(shutil.rmtree, self._partial, ignore_errors=True)

    def _open(self) -> int:
        self._partial.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY)
        except BaseException:
            with contextlib.suppress(OSError):
                self._partial.rmdir()  # unless it holds what an earlier writer left
            raise

    def _write_shard(self) -> None:
        path = self._partial / f"part-{len(self._shards):05d}"
        save_tensors(self._pending, path, {"format": "pt"})
        self._shards.append(list(self._pending))
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        if self._pending:
            self._write_shard()
        count = len(self._shards)
        weight_map = {}
        for number, tensors in enumerate(self._shards):
            name = SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._partial / f"part-{number:05d}").rename(self._partial / name)
            weight_map.update(dict.fromkeys(tensors, name))
        if count > 1:
            self._json[INDEX_NAME] = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        digests = {name: digest_file(self._partial / name) for name in sorted(set(weight_map.values()))}
        self._json["config.json"] = with_shards(self._config, digests)
        for file in self._files:
            shutil.copyfile(file, self._partial / file.name)
        for name, value in self._json.items():
            if isinstance(value, Path):
                shutil.copyfile(value, self._partial / name)
            else:
                self._write_json(name, value)
        if is_sparse_config(self._config):
            self._write_json(SETTINGS_FILE, SettingsRecord.of(self._partial, self._config).to_dict())
        for path in self._partial.iterdir():
            fsync_path(path)
        fsync_path(self._partial)
        self._check_free()
        self._partial.rename(self.out_dir)
        fsync_path(self.out_dir.parent)

    def _write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (self._partial / name).write_text(text, "utf-8")

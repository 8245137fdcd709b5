"""Checkpoints of a training run: whole or absent, and never code.

    OUT.work/checkpoints/step-000120/   shard-*.safetensors   what is learned, and the optimiser's states
                                        checkpoint.json       run, step, seconds so far, digest of every shard

`torch.distributed.checkpoint` writes and reads the tensors (each process its own shard), through its safetensors back
end, so that nothing is pickled. Learning rates and the like are not stored: they follow from the recipe and the step.

A checkpoint is written under a temporary name, flushed, and renamed. One whose digests do not match is passed over with
a warning, and the one before it is used. Older ones beyond `keep` are deleted only after a newer one is whole.
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from maskgen.core.digest import digest_files
from maskgen.core.errors import FormatError, NumericalError, OutOfMemoryError, OutputExistsError, StorageError
from maskgen.core.failures import explained, in_words
from maskgen.core.files import fsync_path, read_json, write_json
from maskgen.numerics.shards import local
from maskgen.train.step import Session

logger = logging.getLogger(__name__)

_MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(\d{6,})")
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)


class Checkpoints:
    """The checkpoints of the run `run_digest` in `folder`, of which the newest `keep` are kept."""

    def __init__(self, folder: Path, run_digest: str, keep: int = 2) -> None:
        self.folder, self.run_digest, self.keep = Path(folder), run_digest, keep
        self.saved_step = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def clean(self) -> None:
        """Remove what a killed process left half written; for the one process that owns the folder."""
        for leftover in self.folder.glob(".*.partial"):
            shutil.rmtree(leftover)

    def save(self, session: Session, extra: Mapping[str, Tensor]) -> None:
        """Write what `session` has learned and `extra` tensors, unless this step is saved already.

        Raises `NumericalError` rather than keep NaN or infinity, and `StorageError` when the disk is full; checkpoints
        that exist are as they were.
        """
        if self.saved_step == session.step:
            return
        tensors = _tensors(session, extra)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(local(tensor)).all():
                raise NumericalError(f"step {session.step}: {name} holds NaN or infinity; lower train.lr")
        path = self._path(session.step)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with explained(path), _dcp_errors():
                save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
            if session.group.first:
                with explained(path):
                    self._finish(partial, path, session)
            session.group.wait()
        except (StorageError, OutOfMemoryError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.saved_step = session.step

    def _finish(self, partial: Path, path: Path, session: Session) -> None:
        """All shards are written: seal them, put the checkpoint in its place, and let go of older ones."""
        manifest = {
            "run": self.run_digest,
            "step": session.step,
            "elapsed_s": session.elapsed_s,
            "shards": _digest(partial),
        }
        write_json(partial / _MANIFEST, manifest)
        for file in partial.iterdir():
            fsync_path(file)
        _remove(path)  # a damaged one that was passed over
        partial.rename(path)
        fsync_path(self.folder)
        for old in self.steps()[: -self.keep]:
            _remove(self._path(old))

    def restore(self, session: Session, extra: Mapping[str, Tensor]) -> bool:
        """Bring `session`, as `prepare` made it, and the `extra` tensors to the newest whole checkpoint, in place.

        False when there is none. Raises `OutputExistsError` for a checkpoint of another run.
        """
        found = self._load(session, lambda: _tensors(session, extra))
        session.optimizer.zero_grad(set_to_none=True)
        return found

    def restore_model(self, session: Session) -> bool:
        """`restore` of the model and the step only: enough to write a result, without making optimiser states."""
        return self._load(session, lambda: _model_tensors(session))

    def _load(self, session: Session, wanted: Callable[[], dict[str, Tensor]]) -> bool:
        """Fill the tensors that `wanted` makes from the newest whole checkpoint, if there is one."""
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                manifest = self._verified(path)
            except FormatError as error:
                logger.warning("%s; going on from what there was before it", error)
                continue
            with _dcp_errors():
                load(wanted(), storage_reader=HuggingFaceStorageReader(str(path)))
            session.step = self.saved_step = step
            session.earlier_s = manifest["elapsed_s"]
            return True
        return False

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, oldest first."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def what_is_kept(self) -> str:
        """A clause for error messages: the newest checkpoint, from which the run can go on."""
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is kept in {self.folder}" if steps else "there is no checkpoint yet"

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _verified(self, path: Path) -> dict[str, Any]:
        manifest = read_json(path / _MANIFEST)
        if manifest.get("run") != self.run_digest:
            raise OutputExistsError(f"{path}: belongs to another run; delete it, or choose another `out`")
        if manifest.get("shards") != _digest(path) or not isinstance(manifest.get("elapsed_s"), float):
            raise FormatError(f"{path}: damaged")
        return manifest


def trained_tensors(session: Session) -> dict[str, Tensor]:
    """What a run changes in the model, by its name in the model: trained parameters and persistent buffers."""
    trained = _only_tensors(get_model_state_dict(session.model, options=_OPTIONS))
    aliases = _aliases(session.model)
    return {name: tensor for name, tensor in trained.items() if name not in aliases}


def _model_tensors(session: Session) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in trained_tensors(session).items()}


def _tensors(session: Session, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is learned, as views of where it lives; the optimiser's states are made if there are none."""
    optimizer = get_optimizer_state_dict(session.model, session.optimizer, options=_OPTIONS)
    states = {name: value for name, value in optimizer.items() if not name.startswith("param_groups.")}
    return {
        **_model_tensors(session),
        **{f"optimizer.{name}": tensor for name, tensor in _only_tensors(states).items()},
        **{f"extra.{name}": tensor for name, tensor in extra.items()},
    }


def _aliases(model: nn.Module) -> set[str]:
    """Further names of tensors that are tied to others (`lm_head`, say): what has two names is stored once."""
    first = {name for name, _ in model.named_parameters()}
    return {
        name.replace(_CHECKPOINT_PREFIX, "")
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in first
    }


def _only_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state.items():
        assert isinstance(value, Tensor), f"{name}: the state of a method or an optimiser must be tensors to be saved"
    return dict(state)


def _digest(folder: Path) -> str:
    return digest_files(folder.glob("*.safetensors"))


def _remove(path: Path) -> None:
    """Delete a checkpoint in a way that never leaves half of one under its name."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.old.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Errors of torch's checkpoints as ours: its wrapper is no `Exception`, and says more than one line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, OSError) or isinstance(in_words(cause), OutOfMemoryError):
                raise cause from None
            raise FormatError(f"not a checkpoint of this model: {cause}") from None

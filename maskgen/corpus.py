"""Training text as packed windows, dealt to steps by arithmetic alone.

Documents are joined with end-of-sequence tokens and cut into windows that do not overlap. The last windows of every
file are held out and never trained on. Sample number s of a run belongs to file s mod F, so that every file contributes
equally whatever its size; within a file windows come in an order shuffled anew for each pass. Which windows a step sees
thus depends on the seed and the step's number only: a resumed run, or one on more processes, sees the same.

Legend: S = windows, B = batch, T = tokens, F = files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from maskgen.core.digest import derive_seed, digest_tensors
from maskgen.core.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """Windows of each file to train on, int64 `[S_f, T]`, and the held-out windows of all files `[S, T]`."""

    files: tuple[Tensor, ...]
    heldout: Tensor
    seed: int

    @classmethod
    def pack(
        cls, streams: Sequence[Tensor], names: Sequence[str], window_tokens: int, heldout_windows: int, seed: int
    ) -> Corpus:
        """Cut token streams (one per file) into windows. `DataError` names a file that is too short."""
        files, heldout = [], []
        for number, (ids, name) in enumerate(zip(streams, names, strict=True)):
            windows_ST = ids[: len(ids) // window_tokens * window_tokens].view(-1, window_tokens)
            kept = len(range(number, heldout_windows, len(streams)))
            if len(windows_ST) <= kept:
                raise DataError(
                    f"{name}: {len(ids)} tokens make {len(windows_ST)} windows of {window_tokens}, and {kept} of them "
                    "are held out; give more text, or lower train.heldout_windows or train.window_tokens"
                )
            files.append(windows_ST[: len(windows_ST) - kept])
            heldout.append(windows_ST[len(windows_ST) - kept :])
        return cls(tuple(files), torch.cat(heldout), seed)

    def batch(self, step: int, batch: int) -> Tensor:
        """The windows of step number `step`, int64 `[B, T]`."""
        return torch.stack([self._window(sample) for sample in range(step * batch, (step + 1) * batch)])

    def digest(self) -> str:
        """Digest of all tokens; the data's link in the provenance chain."""
        named = [(f"file {number}", windows) for number, windows in enumerate(self.files)]
        return digest_tensors("corpus", [*named, ("heldout", self.heldout)])

    def _window(self, sample: int) -> Tensor:
        file = sample % len(self.files)
        windows_ST = self.files[file]
        epoch, position = divmod(sample // len(self.files), len(windows_ST))
        return windows_ST[_order(len(windows_ST), self.seed, file, epoch)[position]]


@lru_cache(maxsize=64)
def _order(windows: int, seed: int, file: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, file, epoch))
    return torch.randperm(windows, generator=generator)

"""Training text as packed windows; which ones a step sees depends only on the seed and the step's number.

Documents are joined with end-of-sequence tokens and cut into windows that do not overlap; each begins with BOS where
the model expects that (`maskgen.data.bos`). The last windows of every
file are held out and never trained on. Sample number s of a run belongs to file s mod F, so that every file contributes
equally whatever its size; within a file windows come in an order shuffled anew for each pass. A resumed run, or one
on more processes, thus sees the same windows.

Ids are int32 and windows are views of them. With a `cache_dir`, ids are tokenised once into files there and mapped, not
read: a corpus may be larger than memory, and a run that goes on does not tokenise again. Such a file is little-endian
int32 and nothing else; its name is a digest of the source and the tokenizer, and it appears whole or not at all. A hub
dataset is identified by its name alone, so a run goes on with what it read first, whatever happens on the hub.

Memory beside the ids: the held-out windows, and 8 bytes per training window for the order of the current pass.

Legend: S = windows, B = batch, T = tokens, F = files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core.digest import derive_seed, digest_bytes, digest_files, digest_json, digest_tensors
from maskgen.core.errors import DataError
from maskgen.core.files import fsync_path, temporary_sibling
from maskgen.data import formats, sources
from maskgen.data.bos import Bos
from maskgen.data.tokens import PIECE_CHARS, read_tokens, token_pieces
from maskgen.recipes.sections import Training

_ID_BYTES = 4


@dataclass(frozen=True)
class Corpus:
    """Text to train on and held-out windows.

    `files` has the windows of each file without BOS, int32 `[S_f, T - BOS]`; `heldout` those of all files, int64
    `[S, T]`, with the `bos` that every window begins with.
    """

    files: tuple[Tensor, ...]
    heldout: Tensor
    seed: int
    bos: Bos = field(default_factory=Bos)
    _orders: dict[int, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def pack(
        cls,
        streams: Sequence[Tensor],
        names: Sequence[str],
        window_tokens: int,
        heldout_windows: int,
        seed: int,
        bos: Bos | None = None,
    ) -> Corpus:
        """Cut token streams (one per file) into windows. `DataError` names a file that is too short or given twice."""
        _check_distinct(streams, names)
        files, heldout, bos = [], [], bos or Bos()
        text_tokens = bos.text_tokens(window_tokens)
        for number, (ids, name) in enumerate(zip(streams, names, strict=True)):
            windows_ST = ids[: len(ids) // text_tokens * text_tokens].view(-1, text_tokens).to(torch.int32)
            kept = len(range(number, heldout_windows, len(streams)))
            if len(windows_ST) <= kept:
                raise DataError(
                    f"{name}: {len(ids)} tokens make {len(windows_ST)} windows of {window_tokens}, and {kept} of them "
                    "are held out; give more text, or lower train.heldout_windows or train.window_tokens"
                )
            files.append(windows_ST[: len(windows_ST) - kept])
            heldout.append(windows_ST[len(windows_ST) - kept :])
        return cls(tuple(files), bos.before(torch.cat(heldout).long()), seed, bos)

    def batch(self, step: int, batch: int) -> Tensor:
        """The windows of step number `step`, int64 `[B, T]`, whatever came before."""
        samples = range(step * batch, (step + 1) * batch)
        return self.bos.before(torch.stack([self._window(sample) for sample in samples]).long())

    def digest(self) -> str:
        """Digest of all tokens; the data's link in the provenance chain. Of BOS it sees what held-out windows have."""
        named = [(f"file {number}", windows) for number, windows in enumerate(self.files)]
        return digest_tensors("corpus", [*named, ("heldout", self.heldout)])

    def _window(self, sample: int) -> Tensor:
        file = sample % len(self.files)
        windows_ST = self.files[file]
        epoch, position = divmod(sample // len(self.files), len(windows_ST))
        return windows_ST[self._order(file, epoch)[position]]

    def _order(self, file: int, epoch: int) -> Tensor:
        """The order of a file's windows in one pass; only the latest of each file is remembered."""
        known = self._orders.get(file)
        if known is not None and known[0] == epoch:
            return known[1]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, file, epoch))
        order = torch.randperm(len(self.files[file]), generator=generator)
        self._orders[file] = epoch, order
        return order


def load_corpus(
    files: Sequence[Path | str],
    tokenizer: Any,
    spec: Training,
    cache_dir: Path | None = None,
    bos: bool | None = None,
) -> Corpus:
    """Read, tokenise and pack `files` (see `data.sources`), through the token cache in `cache_dir` if there is one.

    There are one or more files, and `spec.window_tokens` is settled. `bos` says whether windows begin with BOS; None:
    as the tokenizer does by itself. Raises `DataError`, and `OSError` when the cache cannot be written.
    """
    assert files and spec.window_tokens is not None
    streams = [
        read_tokens(file, tokenizer) if cache_dir is None else _cached_tokens(file, tokenizer, cache_dir)
        for file in files
    ]
    names = [str(file) for file in files]
    opening = Bos.of(tokenizer, bos)
    return Corpus.pack(streams, names, spec.window_tokens, spec.heldout_windows, spec.seed, opening)


def _cached_tokens(source: Path | str, tokenizer: Any, cache_dir: Path) -> Tensor:
    """The ids of a source as a private mapping of its cache file, which is written first if there is none."""
    assert sys.byteorder == "little"
    key = digest_json({"source": _identity(source), "tokenizer": _tokenizer_digest(tokenizer), "piece": PIECE_CHARS})
    path = cache_dir / f"{key.removeprefix('sha256:')}.ids"
    if not path.is_file():
        with temporary_sibling(path) as temporary:
            with temporary.open("wb") as file:
                for piece in token_pieces(source, tokenizer):
                    file.write(piece.tobytes())
            fsync_path(temporary)
    count, rest = divmod(path.stat().st_size, _ID_BYTES)
    if count and not rest:
        ids = torch.from_file(str(path), shared=False, size=count, dtype=torch.int32)
        low, high = ids.aminmax()
        if low >= 0 and high < len(tokenizer):
            return ids
    raise DataError(f"{path}: damaged token cache of {source}; delete this file to tokenise again")


def _identity(source: Path | str) -> str:
    if sources.is_hub(source):
        return str(source)
    path = Path(source)
    with formats.readable(path):
        return digest_files([path])


def _tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what decides ids: the pipeline of a fast tokenizer (of others, class and vocabulary), the template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = digest_json(tokenizer.get_vocab()) if backend is None else digest_bytes(backend.to_str().encode())
    kind, chat = type(tokenizer).__name__, getattr(tokenizer, "chat_template", None)
    return digest_json({"class": kind, "rules": rules, "eos": tokenizer.eos_token_id, "chat": chat})


def _check_distinct(streams: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse equal streams: as one would hold out fewer windows, held-out text could be trained on."""
    for later, ids in enumerate(streams):
        for earlier in range(later):
            if torch.equal(ids, streams[earlier]):
                raise DataError(f"{names[later]}: the same tokens as {names[earlier]}; give every file once")

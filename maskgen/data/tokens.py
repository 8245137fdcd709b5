"""Text or token ids in, token ids and calibration windows out.

Where text comes from is `maskgen.data.sources`' business. Documents are tokenised as they are, and joined with the
tokenizer's end-of-sequence token where it has one; empty ones are passed over. Nothing is added to a document, and what
is written in it as a special token, as chat templates do, becomes that token. But BOS is for windows to begin with
(`maskgen.data.bos`), and a document that begins with it loses it. A document of more than `PIECE_CHARS` characters is
tokenised in pieces cut before a space, because tokenizers need some hundred bytes a token while they work; in
byte-level tokenizers that changes no token.

Ids that exist already are read as they are: a one-dimensional `.npy` array of uint16, int32 or int64, or a
`.safetensors` file with one such tensor named "ids". Every id is compared with the tokenizer's vocabulary.

Calibration windows are cut at positions drawn from a seeded generator; with several sources, windows are dealt to them
in turn, so every source contributes equally whatever its size.

Legend: S = windows, T = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskgen.core import npy
from maskgen.core.digest import digest_tensors
from maskgen.core.errors import DataError, FormatError, clip
from maskgen.core.files import check_tensor_names, open_tensors
from maskgen.data import sources
from maskgen.data.bos import Bos
from maskgen.data.formats import Kind, format_of, readable
from maskgen.data.heldout import HeldOut

PIECE_CHARS = 500_000
"""Characters tokenised at a time."""

CHUNK_IDS = 1 << 22
"""Ready-made ids read at a time."""

_Ids = np.ndarray[Any, np.dtype[np.int32]]
_ID_TYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64}
_EXPECTED_IDS = "expected a one-dimensional little-endian array of uint16, int32 or int64"


def read_tokens(source: Path | str, tokenizer: Any) -> Tensor:
    """All token ids of a source, int32 `[tokens]`. Raises `DataError` naming what is wrong and where."""
    return torch.from_numpy(np.concatenate(list(token_pieces(source, tokenizer))))


def token_pieces(source: Path | str, tokenizer: Any) -> Iterator[_Ids]:
    """The token ids of a source, int32, a piece at a time; `DataError` also when there are none."""
    kind = Kind.TEXT if sources.is_hub(source) else format_of(Path(source)).kind
    if kind is Kind.NUMPY:
        pieces = _checked(_numpy_ids(Path(source)), source, len(tokenizer))
    elif kind is Kind.SAFETENSORS:
        pieces = _checked(_safetensors_ids(Path(source)), source, len(tokenizer))
    else:
        pieces = _tokenised(source, tokenizer)
    empty = True
    for ids in pieces:
        empty = empty and not len(ids)
        yield ids
    if empty:
        raise DataError(f"{source}: holds no text and no tokens")


def calibration_windows(
    files: Sequence[Path | str],
    tokenizer: Any,
    samples: int,
    window_tokens: int,
    generator: torch.Generator,
    bos: Bos | None = None,
    heldout: HeldOut | None = None,
) -> Tensor:
    """Cut `samples` random windows from one or more sources, int64 `[S, T]`, each with `bos` in front.

    `bos` None is what the tokenizer does by itself. What `heldout` takes of a source is left out. Raises `DataError`
    when a source is too short.
    """
    assert files
    bos = Bos.of(tokenizer) if bos is None else bos
    text_tokens = bos.text_tokens(window_tokens)
    windows: list[Tensor] = [torch.empty(0)] * samples
    for number, file in enumerate(files):
        mine = range(number, samples, len(files))
        if not mine:
            raise DataError(f"{len(files)} files for {samples} samples; raise calibration.samples or give fewer files")
        ids = read_tokens(file, tokenizer)
        if heldout is not None:
            ids = heldout.take(file, ids, needed=text_tokens)
        starts = len(ids) - text_tokens + 1
        if starts < 1:
            raise DataError(
                f"{file}: {len(ids)} tokens, shorter than one window of {window_tokens}; give more text or lower "
                "calibration.window_tokens"
            )
        positions = torch.randint(starts, (len(mine),), generator=generator).tolist()
        for sample, start in zip(mine, positions, strict=True):
            windows[sample] = ids[start : start + text_tokens]
    return bos.before(torch.stack(windows).long())


def check_window_tokens(window_tokens: int | None, limit: int | None, section: str = "calibration") -> None:
    """`DataError` when a model that reads at most `limit` tokens (None: any number) cannot read such a window.

    `section` is the section of the recipe that sets the number.
    """
    if limit is not None and window_tokens is not None and window_tokens > limit:
        raise DataError(
            f"{section}.window_tokens: windows of {window_tokens} tokens, but the model reads at most {limit}; set it "
            f"to {limit} or less, or leave it out"
        )


def digest_tokens(ids: Tensor) -> str:
    """Digest of token ids with their shape; the data's link in the provenance chain."""
    return digest_tensors("tokens", [("ids", ids)])


def _tokenised(source: Path | str, tokenizer: Any) -> Iterator[_Ids]:
    eos, bos = tokenizer.eos_token_id, list(Bos.of(tokenizer).ids)
    anything, blank = False, True
    for document in sources.documents(source, tokenizer):
        joined = not anything or eos is None
        for number, piece in enumerate(_pieces(document)):
            if not joined:
                yield np.array([eos], dtype=np.int32)
            joined = anything = True
            blank = blank and piece.isspace()
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            if bos and number == 0 and ids[: len(bos)] == bos:
                ids = ids[len(bos) :]
            yield np.array(ids, dtype=np.int32)
    if anything and blank:
        raise DataError(f"{source}: holds nothing but white space")


def _pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The same text in stretches of at most `PIECE_CHARS`, none empty."""
    text, start = "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk, 0
        while len(text) - start > PIECE_CHARS:
            cut = text.rfind(" ", start + 1, start + PIECE_CHARS)
            while cut > start and text[cut - 1].isspace():  # white space is often one token: do not cut inside it
                cut = text.rfind(" ", start + 1, cut)
            cut = start + PIECE_CHARS if cut < 0 else cut
            yield text[start:cut]
            start = cut
    if start < len(text):
        yield text[start:]


def _checked(arrays: Iterable[np.ndarray[Any, Any]], source: Path | str, vocabulary: int) -> Iterator[_Ids]:
    position = 0
    for array in arrays:
        wrong = (array < 0) | (array >= vocabulary)
        if wrong.any():
            first = int(wrong.argmax())
            raise DataError(
                f"{source}: token id {array[first]} at position {position + first}, but the tokenizer has {vocabulary} "
                "tokens; these ids were made with another tokenizer"
            )
        position += len(array)
        yield array.astype(np.int32)


def _numpy_ids(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """The ids of a `.npy` file, `CHUNK_IDS` at a time; `DataError` if it is damaged or holds anything else."""
    with readable(path), path.open("rb") as file:
        kind, count, start = _npy_header(path, file.read(npy.HEADER_BYTES))
        data_bytes = path.stat().st_size - start
        if data_bytes != count * kind.itemsize:
            raise DataError(f"{path}: {data_bytes} bytes of data for {count} ids of {kind}; write it again")
        file.seek(start)
        for done in range(0, count, CHUNK_IDS):
            yield np.fromfile(file, kind, min(CHUNK_IDS, count - done))


def _npy_header(path: Path, content: bytes) -> tuple[np.dtype[Any], int, int]:
    """Type and number of the ids of a `.npy` file that begins with `content`, and the byte at which they start."""
    header = npy.read_header(content)
    if header is None:
        found = clip(content[:64])
    else:
        kind, shape = header.dtype, header.shape
        if kind.str in ("<u2", "<i4", "<i8") and len(shape) == 1 and shape[0] >= 0:
            return kind, shape[0], header.start
        found = f"{kind.str}, shape {clip(shape)}"
    raise DataError(f"{path}: not a .npy file this release reads ({found}); {_EXPECTED_IDS}")


def _safetensors_ids(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    with readable(path):
        try:
            with open_tensors(path) as file:
                check_tensor_names(path)
                names = sorted(file.keys())
                if names != ["ids"]:
                    raise DataError(f'{path}: holds tensors {clip(names)}, expected one named "ids"')
                stored = file.get_slice("ids")
                kind, shape = str(stored.get_dtype()), stored.get_shape()
                if kind not in _ID_TYPES or len(shape) != 1:
                    raise DataError(f"{path}: ids of {kind} and shape {clip(shape)}; {_EXPECTED_IDS}")
                for start in range(0, shape[0], CHUNK_IDS):
                    yield stored[start : start + CHUNK_IDS].numpy()
        except FormatError as error:
            raise DataError(str(error)) from None

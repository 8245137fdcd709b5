"""Text files to token ids, and token ids to calibration windows.

A `.jsonl` file holds one document per line, in the field "text"; any other file is one document. Documents are
tokenised as they are, without special tokens, and joined with the tokenizer's end-of-sequence token where it has one.
A document of more than `PIECE_CHARS` characters is tokenised in pieces cut before a space, because tokenizers need some
hundred bytes a token while they work; in byte-level tokenizers that changes no token.
Windows are cut at positions drawn from a seeded generator; with several files, windows are dealt to them in turn, so
every file contributes equally whatever its size.

Legend: S = windows, T = tokens of a window.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskgen.core.digest import digest_tensors
from maskgen.core.errors import DataError

PIECE_CHARS = 500_000
"""Characters tokenised at a time."""


def read_tokens(path: Path, tokenizer: Any) -> Tensor:
    """Token ids of a text or `.jsonl` file, int64 `[tokens]`. Raises `DataError` naming file and line."""
    eos = tokenizer.eos_token_id
    parts: list[np.ndarray[Any, Any]] = []
    for text in _documents(Path(path)):
        if parts and eos is not None:
            parts.append(np.array([eos], dtype=np.int64))
        for piece in _pieces(text):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(np.array(ids, dtype=np.int64))
    if not sum(map(len, parts)):
        raise DataError(f"{path}: holds no text")
    return torch.from_numpy(np.concatenate(parts))


def calibration_windows(
    files: Sequence[Path], tokenizer: Any, samples: int, window_tokens: int, generator: torch.Generator
) -> Tensor:
    """Cut `samples` random windows from the files, int64 `[S, T]`. `DataError` when a file is shorter than one."""
    if not files:
        raise DataError("no calibration text; give one or more text or .jsonl files with --data")
    windows: list[Tensor] = [torch.empty(0)] * samples
    for number, file in enumerate(files):
        mine = range(number, samples, len(files))
        if not mine:
            raise DataError(f"{len(files)} files for {samples} samples; raise calibration.samples or give fewer files")
        ids = read_tokens(file, tokenizer)
        starts = len(ids) - window_tokens + 1
        if starts < 1:
            raise DataError(
                f"{file}: {len(ids)} tokens, shorter than one window of {window_tokens}; give more text or lower "
                "calibration.window_tokens"
            )
        positions = torch.randint(starts, (len(mine),), generator=generator).tolist()
        for sample, start in zip(mine, positions, strict=True):
            windows[sample] = ids[start : start + window_tokens]
    return torch.stack(windows)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = text.rfind(" ", start + 1, start + PIECE_CHARS)
        while cut > 0 and text[cut - 1].isspace():  # white space is often one token: do not cut inside it
            cut = text.rfind(" ", start + 1, cut)
        cut = start + PIECE_CHARS if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]


def check_window_tokens(window_tokens: int, limit: int | None) -> None:
    """`DataError` when a model that reads at most `limit` tokens (None: any number) cannot read such a window."""
    if limit is not None and window_tokens > limit:
        raise DataError(
            f"calibration windows of {window_tokens} tokens, but the model reads at most {limit}; set "
            f"calibration.window_tokens to {limit} or less, or leave it out"
        )


def digest_tokens(ids: Tensor) -> str:
    """Digest of token ids with their shape; the data's link in the provenance chain."""
    return digest_tensors("tokens", [("ids", ids)])


def _documents(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (
                    _text_field(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
                )
        else:
            yield path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _text_field(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: expected an object with a string field "text", such as {{"text": "..."}}')
    return text

"""Windows that are held out of calibration text: the last ones, few, and never calibrated on."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from maskgen.data.bos import Bos
from maskgen.data.heldout import WINDOW_TOKENS, WINDOWS, HeldOut
from maskgen.data.tokens import calibration_windows
from tests import models


def numbers(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.int32)


def test_the_last_windows_of_every_text_with_bos() -> None:
    heldout = HeldOut(2, 8, Bos((9999,), True))
    assert heldout.take("dir/one.txt", numbers(700)).tolist() == list(range(644))
    assert heldout.take("two.txt", numbers(145, 1000)).tolist() == list(range(1000, 1131))
    ids_ST = heldout.windows()
    assert ids_ST is not None and ids_ST.shape == (8 + 2, 8) and ids_ST.dtype == torch.int64
    assert ids_ST[:, 0].eq(9999).all() and heldout.names == ["one.txt", "two.txt"]
    assert ids_ST[:, 1:].flatten().tolist() == [*range(644, 700), *range(1131, 1145)]


@given(st.lists(st.integers(0, 90_000), min_size=1, max_size=20), st.sampled_from([None, 64, 4096]))
def test_never_many_and_never_much_of_a_text(lengths: list[int], limit: int | None) -> None:
    heldout, taken = HeldOut(len(lengths), limit, Bos()), 0
    assert heldout.window_tokens == min(limit or WINDOW_TOKENS, WINDOW_TOKENS)
    for length in lengths:
        left = len(heldout.take("text", numbers(length), needed=length - 700))
        assert length - left <= min(length / 10, 700)
        taken += (length - left) // heldout.window_tokens
    ids_ST = heldout.windows()
    assert taken <= WINDOWS and taken == (0 if ids_ST is None else len(ids_ST))


def test_nothing_is_calibrated_on_what_is_held_out(text_file: Path) -> None:
    tokenizer, generator = models.tokenizer(), torch.Generator().manual_seed(0)
    heldout = HeldOut(1, 32, Bos())
    windows_ST = calibration_windows([text_file], tokenizer, 200, 32, generator, Bos(), heldout)
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    kept = heldout.windows()
    assert kept is not None and kept.flatten().tolist() == ids[len(ids) - kept.numel() :]
    before = torch.tensor(ids[: len(ids) - kept.numel()])
    spans = {tuple(before[start : start + 32].tolist()) for start in range(len(before) - 31)}
    assert all(tuple(window) in spans for window in windows_ST.tolist())

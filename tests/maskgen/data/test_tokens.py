"""Text to tokens to calibration windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskgen.core.errors import DataError
from maskgen.data import tokens
from maskgen.data.tokens import calibration_windows, digest_tokens, read_tokens
from tests import models


@pytest.fixture(scope="module")
def tokenizer() -> models.PreTrainedTokenizerFast:
    return models.tokenizer()


def windows(
    files: list[Path], tokenizer: object, samples: int = 6, window_tokens: int = 10, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return calibration_windows(files, tokenizer, samples, window_tokens, generator)


def test_text_is_one_document_without_special_tokens(tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("On day 1\n\nthe fox", "utf-8")
    ids = read_tokens(path, tokenizer)
    assert ids.dtype == torch.int32
    assert tokenizer.decode(ids.tolist()) == "On day 1\n\nthe fox"


def test_jsonl_documents_are_joined_with_eos(tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the fox", "id": 3}\n\n{"text": ""}\n{"text": "a \\u00e9 boat"}\n', "utf-8")
    assert tokenizer.decode(read_tokens(path, tokenizer).tolist()) == "the fox</s>a é boat"


@pytest.mark.parametrize("piece_chars", [97, 1000])
def test_long_text_gives_the_same_tokens_in_pieces(
    piece_chars: int, tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "\n\n  ".join(models.TEXT[at : at + 71] for at in range(0, 9000, 71)).replace("On", " \n On"), "utf-8"
    )
    whole = read_tokens(path, tokenizer)
    monkeypatch.setattr(tokens, "PIECE_CHARS", piece_chars)
    assert torch.equal(read_tokens(path, tokenizer), whole)


def test_a_line_longer_than_a_piece_is_cut_and_nothing_is_lost(
    tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(models.TEXT[:3000], "utf-8")
    monkeypatch.setattr(tokens, "PIECE_CHARS", 64)
    assert tokenizer.decode(read_tokens(path, tokenizer).tolist()) == models.TEXT[:3000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n" * 900, "holds nothing but white space"),
        ("a.jsonl", b'{"text": " "}\n{"text": "\\n"}\n', "holds nothing but white space"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r'a\.jsonl:2: expected an object with a string field "text"'),
        ("a.jsonl", b'{"txt": "x"}\n', r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b"{'text'}\n", r"a\.jsonl:1: not valid JSON"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_tokens(tmp_path / name, tokenizer)


def test_a_missing_file_is_a_data_error(tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"absent\.txt: cannot be read: No such file"):
        read_tokens(tmp_path / "absent.txt", tokenizer)


def test_windows_are_stretches_of_the_text_and_follow_the_seed(
    text_file: Path, tokenizer: models.PreTrainedTokenizerFast
) -> None:
    ids = read_tokens(text_file, tokenizer)
    cut = windows([text_file], tokenizer, samples=20)
    assert cut.shape == (20, 10) and cut.dtype == torch.int64
    stretches = {tuple(window) for window in ids.unfold(0, 10, 1).tolist()}
    assert all(tuple(window) in stretches for window in cut.tolist())
    assert torch.equal(cut, windows([text_file], tokenizer, samples=20))
    assert not torch.equal(cut, windows([text_file], tokenizer, samples=20, seed=1))
    assert digest_tokens(cut) == digest_tokens(cut.clone())
    assert digest_tokens(cut) != digest_tokens(cut.flip(0))
    assert digest_tokens(cut) != digest_tokens(cut.reshape(10, 20))


def test_a_file_of_exactly_one_window_is_enough(tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the fox saw 4 stones", "utf-8")
    ids = read_tokens(path, tokenizer)
    assert torch.equal(windows([path], tokenizer, samples=2, window_tokens=len(ids)), torch.stack([ids, ids]))
    with pytest.raises(DataError, match=rf"{len(ids)} tokens, shorter than one window of {len(ids) + 1}"):
        windows([path], tokenizer, window_tokens=len(ids) + 1)


def test_samples_are_dealt_evenly_over_files(tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast) -> None:
    files = []
    for number, repeats in enumerate((400, 40, 100)):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text(json.dumps({"text": str(number) * repeats}), "utf-8")
    cut = windows(files, tokenizer, samples=7, window_tokens=4)
    sources = [{int(digit) for digit in tokenizer.decode(window)} for window in cut.tolist()]
    assert sources == [{0}, {1}, {2}, {0}, {1}, {2}, {0}]
    with pytest.raises(DataError, match="3 files for 2 samples"):
        windows(files, tokenizer, samples=2, window_tokens=4)


IDS = [0, 7, 319, 2, 2, 5, 1, 44]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_ready_made_ids_are_read_as_they_are(
    tmp_path: Path,
    tokenizer: models.PreTrainedTokenizerFast,
    kind: Any,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "CHUNK_IDS", 3)
    path = tmp_path / f"ids{suffix}"
    if suffix == ".npy":
        np.save(path, np.array(IDS, dtype=kind))
    else:
        save_file({"ids": torch.from_numpy(np.array(IDS, dtype=kind))}, path)
    ids = read_tokens(path, tokenizer)
    assert ids.dtype == torch.int32 and ids.tolist() == IDS


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([3, 4, 320]), r"token id 320 at position 2, but the tokenizer has 320 tokens"),
        (np.array([3, -1]), r"token id -1 at position 1"),
        (np.array([2**40]), r"token id 1099511627776 at position 0"),
        (np.array([], dtype=np.int32), "holds no text and no tokens"),
        (
            np.array([[1, 2]]),
            r"not a \.npy file this .* expected a one-dimensional little-endian array of uint16, int32 or int64",
        ),
        (np.array([1.0, 2.0]), r"not a .*<f8.* expected a one-dimensional"),
        (np.array([1, 2], dtype=">i4"), r"not a .*>i4"),
        (np.array([True]), r"not a .*\|b1"),
        (np.array([{}], dtype=object), r"not a .*\|O"),
    ],
)
def test_arrays_that_are_no_ids(
    tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast, array: np.ndarray[Any, Any], message: str
) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, array, allow_pickle=array.dtype == object)
    with pytest.raises(DataError, match=rf"ids\.npy: {message}"):
        read_tokens(path, tokenizer)


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\x01\x00\x00\x00"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 an npz",
        b"\x93NUMPY\x01\x00",
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (100,), }\n"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904,), }\n"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-3,), }\n"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (" + "9" * 40 + ",), }\n"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': 'x'}\n"),
        npy("__import__('os').abort()\n"),
        npy("(" * 3000 + "\n"),
        npy("(" * 900 + "\n"),
        npy("{'descr': [('x', '<i4')], 'fortran_order': False, 'shape': (1,), }\n"),
        npy("{'descr': 'f4,(', 'fortran_order': False, 'shape': (1,), }\n"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1,), 'more': 1}\n"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1,), "),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr': '<i4'",
        b"\x93NUMPY\x09\x00" + npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1,), }\n")[8:],
    ],
)
def test_damaged_npy_files(tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast, content: bytes) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"ids\.npy: "):
        read_tokens(path, tokenizer)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"tokens": torch.tensor([1])}, r"holds tensors \['tokens'\], expected one named \"ids\""),
        ({"ids": torch.tensor([1]), "more": torch.tensor([1])}, r"holds tensors \['ids', 'more'\]"),
        ({"ids": torch.tensor([1.5])}, r"ids of F32 and shape \[1\]"),
        ({"ids": torch.tensor([[1]])}, r"ids of I64 and shape \[1, 1\]"),
        ({"ids": torch.tensor(1)}, r"ids of I64 and shape \[\]"),
        ({"ids": torch.tensor([5, 999])}, r"token id 999 at position 1"),
        ({"ids": torch.zeros(0, dtype=torch.int64)}, r"holds no text and no tokens"),
    ],
)
def test_tensors_that_are_no_ids(
    tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "ids.safetensors"
    save_file(tensors, path)
    with pytest.raises(DataError, match=rf"ids\.safetensors: {message}"):
        read_tokens(path, tokenizer)


def test_a_damaged_safetensors_file(tmp_path: Path, tokenizer: models.PreTrainedTokenizerFast) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"ids": torch.arange(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"ids\.safetensors: not a valid safetensors file"):
        read_tokens(path, tokenizer)

"""Strict reading and atomic writing of single files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskgen.core.errors import FormatError, StorageError
from maskgen.core.files import (
    MAX_JSON_BYTES,
    check_tensor_names,
    check_writable,
    open_tensors,
    read_json,
    save_tensors,
    temporary_sibling,
    write_json,
)
from tests.directories import raw_safetensors


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ü\U0001f600": {"x": "\n"}}
    write_json(tmp_path / "new" / "x.json", value)
    assert read_json(tmp_path / "new" / "x.json") == value
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]


def test_escaped_pairs_of_surrogates_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "x.json") == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        ('{"a": 1}'.encode("utf-16"), "decode"),
        (b'{"a": "\xff"}', "decode"),
        (b'{"a": "\xed\xa0\x80"}', "decode"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"a": {"\\uDFFF": 1}}', "surrogates"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": [1e999]}', "'1e999' does not fit"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
        (b'{"b": [{"a": 1, "x": 2, "a": 3}]}', "duplicate key 'a'"),
        (b'{"a": 1, "\\u0061": 1}', "duplicate key 'a'"),
        (b'{"' + b"k" * 10**6 + b'": 1, "' + b"k" * 10**6 + b'": 2}', "duplicate key 'kkk"),
        (b"[" * 100_000, "nested too deeply|recursion"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply|recursion"),
        (b"[]", "a JSON list, expected an object"),
        (b'"a"', "a JSON str, expected an object"),
        (b"null", "a JSON NoneType, expected an object"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(FormatError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 300


def test_json_of_too_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(FormatError, match=f"{MAX_JSON_BYTES + 1} bytes of JSON, at most {MAX_JSON_BYTES}"):
        read_json(path)


def test_a_duplicate_among_many_keys_is_found_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    keys = [f'"{number}":0' for number in range(100_000)]
    path.write_text("{" + ",".join([*keys, keys[-1]]) + "}")
    start_s = time.process_time()
    with pytest.raises(FormatError, match="duplicate key '99999'"):
        read_json(path)
    assert time.process_time() - start_s < 2.0


@pytest.mark.parametrize("reader", [read_json, lambda path: open_tensors(path).__enter__()])
def test_what_is_not_a_file(tmp_path: Path, reader: object) -> None:
    assert callable(reader)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    for name, message in (("", "not a regular"), ("fifo", "not a regular"), ("none", "no such"), ("file/x", "no such")):
        with pytest.raises(FormatError, match=f"{message} file"):
            reader(tmp_path / name)


def test_tensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors({"b": torch.arange(3), "a": torch.ones(2, 2)}, path, {"format": "pt"})
    check_tensor_names(path)
    with open_tensors(path) as file:
        assert sorted(file.keys()) == ["a", "b"]
        assert file.get_tensor("b").tolist() == [0, 1, 2]


def test_an_unreadable_tensor_is_a_format_error_too(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    with (
        pytest.raises(FormatError, match=r"x\.safetensors: not a valid"),
        open_tensors(raw_safetensors(tmp_path / "x.safetensors", header, b"abc")) as file,
    ):
        file.get_tensor("a")


@pytest.mark.parametrize("name", ["a", "\\u0061"])
def test_tensor_names_must_be_unique(tmp_path: Path, name: str) -> None:
    one = '":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    path = raw_safetensors(tmp_path / "x.safetensors", f'{{"a{one},"{name}{one}}}'.encode(), b"x")
    with open_tensors(path) as file:
        assert list(file.keys()) == ["a"]
    with pytest.raises(FormatError, match=r"x\.safetensors: not valid JSON: duplicate key 'a'"):
        check_tensor_names(path)


def test_saving_where_there_is_no_place_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"x\.safetensors"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "none" / "x.safetensors", {})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(KeyError), temporary_sibling(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_real_name_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    with temporary_sibling(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".")
        save_tensors({"a": torch.ones(2)}, temporary, {})
        assert not path.exists()
    assert load_file(path)["a"].tolist() == [1.0, 1.0]


def test_what_can_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new/folder/x.json", tmp_path / "file", None)
    for path, message in (
        (tmp_path, "not a regular file; choose another name"),
        (Path("/dev/null"), "not a regular file; choose another name"),
        (tmp_path / "file/x.json", "file is not a directory; choose another place"),
    ):
        with pytest.raises(StorageError, match=f"^{path}: .*{message}"):
            check_writable(tmp_path / "x.json", path)
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everywhere
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be written; change its permissions"):
        check_writable(tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_tensors_can_be_read_by_whom_other_files_can(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {})
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.json").stat().st_mode

"""GGUF files: what is kept, what is refused, and that a file is converted once."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import FormatError, ModelError, SparseError, StorageError
from maskgen.hf import gguf, model
from tests import gguf_files, models


def silent(what: str) -> None:
    pass


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file. Do not write to it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.save(path)
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparse-serve" / "gguf"


def error_of(path: Path, kind: type[SparseError]) -> str:
    """The one line that a file is refused with; nothing is left behind."""
    out = path.parent / "out"
    with pytest.raises(kind) as caught:
        gguf.convert(path, out)
    assert not list(path.parent.glob("*out*")) and len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_weights_are_the_dequantised_ones_in_bfloat16(tmp_path: Path) -> None:
    expected = gguf_files.save(tmp_path / "tiny.gguf")
    gguf.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_the_directory_is_an_ordinary_one(file: Path, tmp_path: Path) -> None:
    gguf.convert(file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"] and config["max_position_embeddings"] == models.MAX_TOKENS
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1
    tokenizer, original = AutoTokenizer.from_pretrained(tmp_path / "out"), models.tokenizer()
    for text in (models.TEXT[:500], "à la carte, 漢字 \n\t<s> </s>"):
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (models.BOS, models.EOS)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi\n"
    loaded = model.load(tmp_path / "out")
    assert next(loaded.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("add", [True, False])
def test_bos_is_added_where_the_file_says_so(add: bool, tmp_path: Path) -> None:
    gguf_files.save(tmp_path / "tiny.gguf", {"tokenizer.ggml.add_bos_token": add})
    gguf.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer("On day 1")["input_ids"][0] == tokenizer.bos_token_id) == add


@pytest.mark.parametrize(
    ("words", "text", "cut"),
    [
        ("gpt-2", "x   12 y", ["x", "ĠĠ", "Ġ12", "Ġy"]),
        ("smollm", "x   12 y", ["x", "ĠĠĠ", "1", "2", "Ġy"]),
        ("llama-bpe", "x   1234 I'LL", ["x", "ĠĠ", "Ġ", "123", "4", "ĠI", "'LL"]),
        ("qwen2", "x\n\n 12 y", ["x", "ĊĊ", "Ġ", "1", "2", "Ġy"]),
        ("of another day", "x   12 y", ["x", "ĠĠ", "Ġ12", "Ġy"]),
    ],
)
def test_words_are_cut_as_the_file_says(words: str, text: str, cut: list[str], tmp_path: Path) -> None:
    """By the published rules, worked out by hand."""
    gguf_files.save(tmp_path / "tiny.gguf", words=words)
    gguf.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)] == cut
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_a_file_is_converted_once(file: Path, own_cache: Path) -> None:
    told: list[str] = []
    first = gguf.converted(file, told.append)
    assert told == ["reading tiny.gguf", "converting tiny.gguf"]
    assert first.parent == own_cache and first.name.startswith("tiny--")
    second = gguf.converted(file, told.append)
    assert second == first and told[2:] == ["reading tiny.gguf"]
    assert {path for path in own_cache.iterdir() if not path.name.endswith(".lock")} == {first}


def test_another_file_of_that_name_is_another_model(file: Path, own_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(file.read_bytes().replace(b"['content']", b"['contenT']"))
    assert gguf.converted(file, silent) != gguf.converted(tmp_path / "tiny.gguf", silent)


def test_what_a_killed_process_left_is_removed(file: Path, own_cache: Path) -> None:
    made = gguf.converted(file, silent)
    left = made.with_name(f".{made.name}.0123abcd.partial")
    made.rename(left)
    assert gguf.converted(file, silent) == made and not left.exists()


def _convert(file: Path, answers: multiprocessing.Queue[str]) -> None:
    told: list[str] = []
    gguf.converted(file, told.append)
    answers.put(told[-1])


def test_two_processes_convert_a_file_once(file: Path, own_cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=_convert, args=(file, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert sorted(answers.get(timeout=60) for _ in workers)[0] == "converting tiny.gguf"
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len([path for path in own_cache.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.9, 0.99999])
def test_a_file_that_was_cut_off_is_refused(share: float, file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    said = error_of(tmp_path / "cut.gguf", FormatError)
    assert "download it again" in said or "not a GGUF file" in said


def test_damage_in_the_header_is_refused_or_harmless(file: Path, tmp_path: Path) -> None:
    """Any byte may be wrong: one line says so, or the model that comes out loads."""
    data, chance = file.read_bytes(), random.Random(0)
    for attempt in range(8):
        damaged = bytearray(data)
        damaged[chance.randrange(200, 1500)] ^= 1 << chance.randrange(8)
        path, out = tmp_path / "damaged.gguf", tmp_path / f"out{attempt}"
        path.write_bytes(damaged)
        try:
            gguf.convert(path, out)
        except SparseError as error:
            assert len(str(error).splitlines()) == 1 and not out.exists()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"general.architecture": "unheard-of"}, ModelError, "cannot read the architecture 'unheard-of' from GGUF"),
        ({"general.type": "adapter"}, ModelError, "holds 'adapter', expected a model"),
        ({"split.count": 3}, ModelError, "one of 3 parts; join them with `llama-gguf-split --merge`"),
        ({"tokenizer.ggml.model": "rwkv"}, ModelError, "'rwkv'"),
        ({"llama.embedding_length": 128}, FormatError, "has the shape (320, 64), expected (320, 128)"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    changes: dict[str, object], kind: type[SparseError], message: str, tmp_path: Path
) -> None:
    gguf_files.save(tmp_path / "other.gguf", changes)
    assert message in error_of(tmp_path / "other.gguf", kind)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    gguf_files.save(tmp_path / "less.gguf", without="layers.1.mlp.down_proj")
    assert "1 tensors are missing, such as model.layers.1.mlp.down_proj.weight" in error_of(
        tmp_path / "less.gguf", FormatError
    )


def test_numbers_that_are_none_are_found(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    (tmp_path / "nan.gguf").write_bytes(data[:-34] + b"\xff\x7f" + data[-32:])  # the scale of the last block
    assert "NaN or infinity" in error_of(tmp_path / "nan.gguf", FormatError)


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_full_disk_is_one_line(fails_at: int, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)

    def full(descriptor: int) -> None:
        if next(calls) >= fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"/out: No space left on device; make room"):
        gguf.convert(file, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_text_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "letter.gguf").write_text("Dear reader")
    assert error_of(tmp_path / "letter.gguf", FormatError).endswith(
        "not a GGUF file: starts with b'Dear', expected b'GGUF'; download it again"
    )


def test_packages_that_are_missing_are_named(file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(SparseError, match=r"needs accelerate, not installed: pip install 'sparse-serve\[gguf\]'"):
        gguf.converted(file, silent)


def test_a_user_without_a_home_is_told_what_to_set(file: Path, no_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with pytest.raises(SparseError, match=r"no folder for caches: .*set XDG_CACHE_HOME"):
            gguf.converted(file, silent)
        # older releases of platformdirs leave the home unresolved
        monkeypatch.setattr(gguf, "user_cache_path", lambda app: Path("~/.cache") / app)


def test_resolve_takes_a_file_by_name_or_content(file: Path, own_cache: Path, tmp_path: Path) -> None:
    made = model.resolve(str(file))
    assert (made / "model.safetensors").is_file()
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(file.read_bytes())
    assert (model.resolve(str(blob)) / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"nothing\.gguf: no such file"):
        model.resolve("nothing.gguf")
    with pytest.raises(
        ModelError, match=r"directory of GGUF files without a config\.json; give one file: .*tiny\.gguf"
    ):
        model.resolve(str(file.parent))


def test_what_reads_directories_says_so(file: Path) -> None:
    with pytest.raises(FormatError, match=r"tiny\.gguf: a file, expected a model directory; `maskgen decompress`"):
        SparseCheckpoint.open(file)

"""Hostile `config.json` and shard indices: no path leaves the directory, no size is believed, no code is touched."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskgen.core.checkpoint import INDEX_NAME, SparseCheckpoint, is_sparse_checkpoint
from maskgen.core.files import MAX_JSON_BYTES
from tests.directories import HIDDEN, INNER, TARGETS, edit_config, refused, sparse_dir

Section = dict[str, Any]
DIGEST = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_dir(tmp_path_factory.mktemp("hostile") / "tiny")


@pytest.fixture(scope="module")
def sound_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_dir(tmp_path_factory.mktemp("hostile") / "sharded", shard_bytes=8000)


@pytest.fixture
def victim(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "victim"))


@pytest.fixture
def sharded(sound_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_sharded, tmp_path / "sharded"))


def edit_section(path: Path, edit: Callable[[Section], Any]) -> None:
    edit_config(path, lambda config: edit(config["quantization_config"]))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.update(pattern="2:4; import os"), "pattern '2:4; import os': expected 'n:m'"),
        (lambda s: s.update(pattern="1:4"), f"{TARGETS[0]}: values .* under pattern 1:4"),
        (lambda s: s.update(pattern="2:1000000"), "pattern '2:1000000'"),
        (lambda s: s.update(format_version=1), "format_version 1, this release reads 2"),
        (lambda s: s.update(format_version=True), "format_version True"),
        (lambda s: s.update(format_version=2.0), r"format_version 2\.0"),
        (lambda s: s.update(format_version="2"), "format_version '2'"),
        (lambda s: s.pop("format_version"), "format_version None"),
        (lambda s: s.update(quant_method="__import__('os')"), "quant_method"),
        (lambda s: s.update(auto_map={"a": "b"}), r"unknown keys \['auto_map'\]"),
        (lambda s: s.update({f"k{n}": n for n in range(10_000)}), r"unknown keys \['k0', .*\.\.\., missing"),
        (lambda s: s.pop("mask_digest"), r"missing keys \['mask_digest'\]"),
        (lambda s: s.update(mask_digest="sha256:" + "0" * 64), "stored masks have digest"),
        (lambda s: s.update(targets=["../../etc/passwd"]), r"targets holds '\.\./\.\./etc/passwd'"),
        (lambda s: s.update(targets=["/etc/passwd"]), "targets holds '/etc/passwd'"),
        (lambda s: s.update(targets=["C:\\x"]), "targets holds"),
        (lambda s: s.update(targets=["model.layers.*"]), "targets holds"),
        (lambda s: s.update(targets=[["a"] * 10_000]), "targets holds"),
        (lambda s: s["targets"].append("model.layers.7.up_proj"), r"target model\.layers\.7\.up_proj: .*found \[\]$"),
        (lambda s: s["targets"].pop(), rf"tensor '{TARGETS[-1]}\.(values|bitmask)' belongs to no target"),
        (lambda s: s["targets"].append(s["targets"][0]), "targets names a module twice"),
        (lambda s: s.update(ignored=["model.none"]), r"ignored module model\.none has no \.weight"),
        (lambda s: s.update(ignored=[TARGETS[0]]), "both in targets and in ignored"),
        (lambda s: s.update(base_model={"name": "\x1b]0;x\x07", "digest": s["mask_digest"]}), r"base_model\.name"),
    ],
)
def test_sections(victim: Path, edit: Callable[[Section], Any], message: str) -> None:
    edit_section(victim, edit)
    refused(SparseCheckpoint.open, victim, message)


@pytest.mark.parametrize("section", [None, [], "sparse_nm", 1, True, {}])
def test_sections_of_another_kind(victim: Path, section: Any) -> None:
    edit_config(victim, lambda config: config.update(quantization_config=section))
    refused(SparseCheckpoint.open, victim, r"config\.json: quantization_config: ")
    assert not is_sparse_checkpoint(victim)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "ffn_dim"])
@pytest.mark.parametrize(
    "size", [10**12, 2**63, 10**100, -1, -HIDDEN, 0, 33, True, False, "32", 32.0, [32], {"a": 32}, "9" * 10**6]
)
def test_a_model_larger_than_what_is_stored(victim: Path, key: str, size: Any) -> None:
    edit_config(victim, lambda config: config.update({key: size}))
    refused(SparseCheckpoint.open, victim, rf"config\.json: {key} .* is not a dimension of any stored tensor")


@pytest.mark.parametrize("layers", [3, 10**9, 10**100, 0, -1, True, "2", 2.0, [2], "9" * 10**6])
def test_more_blocks_than_are_stored(victim: Path, layers: Any) -> None:
    edit_config(victim, lambda config: config.update(num_hidden_layers=layers))
    refused(SparseCheckpoint.open, victim, r"config\.json: num_hidden_layers .*, but tensors of 2 blocks are stored")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "not valid JSON"),
        (b"[]", "a JSON list"),
        (b'{"quantization_config": {}, "quantization_config": {}}', "duplicate key 'quantization_config'"),
        (b'{"quantization_config": {"pattern": "2:4", "pattern": "4:8"}}', "duplicate key 'pattern'"),
        (b'{"rope_theta": NaN}', "NaN is not JSON"),
        (b'{"rope_theta": 1e400}', "does not fit"),
        (b'{"x": "\\udc80"}', "surrogates"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply|recursion"),
        (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply|recursion"),
        (b"\x80\x04\x95", "decode"),
    ],
)
def test_config_that_is_not_strict_json(victim: Path, text: bytes, message: str) -> None:
    (victim / "config.json").write_bytes(text)
    refused(SparseCheckpoint.open, victim, rf"config\.json: .*({message})")


def test_config_of_65_megabytes_is_not_even_read(victim: Path) -> None:
    os.truncate(victim / "config.json", 65 << 20)
    refused(SparseCheckpoint.open, victim, rf"{65 << 20} bytes of JSON, at most {MAX_JSON_BYTES}", most_mib=8)


@pytest.mark.parametrize("item", [b"[]", b"{}", b"1.5", b"null", b'""', b'{"a":[{}]}'])
def test_sixty_megabytes_of_nothing(victim: Path, item: bytes) -> None:
    """A parsed value may take twenty times the bytes of its text, so values are counted before they are parsed."""
    (victim / "config.json").write_bytes(b'{"a":[' + (item + b",") * ((60 << 20) // (len(item) + 1)) + b"0]}")
    refused(SparseCheckpoint.open, victim, r"config\.json: more than 4194304 JSON values", most_mib=128)


def test_two_million_targets(victim: Path) -> None:
    edit_section(victim, lambda section: section.update(targets=[f"t{number}" for number in range(2**21)]))
    refused(SparseCheckpoint.open, victim, "targets holds 2097152 names, expected 1 to 1048576", 512, most_s=4)


def test_code_is_never_touched(victim: Path) -> None:
    """`auto_map` is what transformers needs `trust_remote_code` for; to us it is data, and it travels as data."""
    (victim / "modeling_custom.py").write_text("raise SystemExit('imported')")
    (victim / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "modeling_custom.T"}}')
    auto_map = {"AutoModelForCausalLM": "modeling_custom.M", "AutoConfig": "someone/else--configuration.C"}
    edit_config(victim, lambda config: config.update(auto_map=auto_map, custom_pipelines={"x": {"impl": "m.P"}}))
    modules = set(sys.modules)
    assert SparseCheckpoint.open(victim).hf_config["auto_map"] == auto_map
    assert set(sys.modules) == modules


def edit_index(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((path / INDEX_NAME).read_text())
    edit(index)
    (path / INDEX_NAME).write_text(json.dumps(index))


LAST = "model.layers.1.mlp.down_proj.values"


def first_shard(index: dict[str, Any]) -> str:
    return min(index["weight_map"].values())


def all_to(name: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], name))


@pytest.mark.parametrize(
    "name",
    ["../sharded/model-00001-of-00002.safetensors", "/etc/passwd", "/etc/x.safetensors", "..", "", ".safetensors",
     "a/../model.safetensors", "a\\b.safetensors", "model.safetensors\n", "model.safetensors\x00.safetensors",
     "..model.safetensors", ".hidden.safetensors", "~/x.safetensors", "$HOME.safetensors", "model.bin", "é.safetensors",
     "model.safetensors -> /etc/passwd", "x" * 10**4 + ".safetensors", None, 7, True, ["a"], {"a": 1}],
)  # fmt: skip
def test_shard_names_that_are_not_plain(sharded: Path, name: Any) -> None:
    edit_index(sharded, all_to(name))
    refused(SparseCheckpoint.open, sharded, rf"{INDEX_NAME}: shard .* is not a plain \*\.safetensors file name")


def test_a_shard_may_not_be_a_way_out(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret words")
    shard = next(sharded.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=shard.name) as caught:
        SparseCheckpoint.open(sharded)
    assert "secret words" not in str(caught.value)


@pytest.mark.parametrize(
    "edit, message",
    [
        (all_to("model-00009-of-00009.safetensors"), r"model-00009-of-00009\.safetensors: no such file"),
        (lambda i: i.update(weight_map={}), "no weight_map object"),
        (lambda i: i.update(weight_map=[]), "no weight_map object"),
        (lambda i: i.pop("weight_map"), "no weight_map object"),
        (lambda i: i["weight_map"].pop("lm_head.weight"), r"tensor 'lm_head\.weight': index says None"),
        (lambda i: i["weight_map"].update({"x": i["weight_map"]["lm_head.weight"]}), "tensor 'x': .*found in no shard"),
        (lambda i: i["weight_map"].update({LAST: first_shard(i)}), rf"tensor '{LAST}': index says .*, found in model-"),
        (lambda i: i["weight_map"].update({"x" * 10**6: i["weight_map"]["lm_head.weight"]}), r"tensor 'x+\.\.\."),
    ],
)
def test_indices_that_lie(sharded: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_index(sharded, edit)
    refused(SparseCheckpoint.open, sharded, message)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    refused(SparseCheckpoint.open, sharded, rf"{second.name}: tensor .* is also in {first.name}")


def test_an_index_that_hides_a_shard(sharded: Path) -> None:
    """A reader that prefers `model.safetensors` to the index would load other weights than were verified."""
    first = min(sharded.glob("*.safetensors"))
    shutil.copy(first, sharded / "model.safetensors")
    refused(SparseCheckpoint.open, sharded, r"'model\.safetensors' is not one of the checkpoint's shards")


def test_the_sound_ones_open(victim: Path, sharded: Path) -> None:
    assert SparseCheckpoint.open(victim).hf_config["intermediate_size"] == INNER
    assert SparseCheckpoint.open(sharded).config == SparseCheckpoint.open(sharded, verify_bits=False).config


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({}, "shards {}, expected an object of file names and digests"),
        ([], r"shards \[\], expected an object"),
        (None, "shards None, expected an object"),
        ({"model.safetensors": "sha256:00"}, "shards: model.safetensors: 'sha256:00' is not a digest"),
        ({"model.safetensors": None}, "shards: model.safetensors: None is not a digest"),
        ({"../model.safetensors": DIGEST}, r"shards: '\.\./model.safetensors' is not a plain"),
        ({"/etc/passwd": DIGEST}, "shards: '/etc/passwd' is not a plain"),
        ({"other.safetensors": DIGEST}, r"has digests of \['other.safetensors'\], but the shards are"),
        ({"model.safetensors": DIGEST, "other.safetensors": DIGEST}, "but the shards are"),
    ],
)
def test_digests_of_shards(victim: Path, shards: Any, message: str) -> None:
    edit_section(victim, lambda section: section.update(shards=shards))
    refused(SparseCheckpoint.open, victim, message)

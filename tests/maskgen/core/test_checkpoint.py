"""Reading a sound sparse checkpoint: what `open` gives back, and what it may not mind. Damage is in `tests/hostile`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from maskgen.core.checkpoint import SparseCheckpoint, is_sparse_checkpoint, read_headers
from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from maskgen.core.pattern import NMPattern
from tests.directories import (
    LAYERS,
    RECIPE,
    TARGETS,
    bits,
    dense_dir,
    edit_config,
    magnitude_masks,
    read_all,
    sparse_dir,
)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_dir(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_manifest_and_names(sparse: Path) -> None:
    checkpoint = SparseCheckpoint.open(str(sparse))
    assert checkpoint.config.targets == TARGETS
    assert checkpoint.config.ignored == ("lm_head",)
    assert checkpoint.config.base_model == "tiny-dense"
    assert checkpoint.config.recipe_digest == RECIPE
    assert checkpoint.hf_config["hidden_size"] == 32
    assert len(checkpoint.headers) == 3 + LAYERS * (2 + 3 * 2)
    assert checkpoint.headers["model.layers.0.mlp.up_proj.values"].shape == (64, 16)
    assert checkpoint.headers["model.layers.0.mlp.up_proj.bitmask"].dtype == "U8"


def test_tensors_are_those_of_the_dense_model(sparse: Path) -> None:
    checkpoint = SparseCheckpoint.open(sparse)
    dense = read_all(sparse.with_name("tiny-dense"))
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.bias"):
        assert bits(checkpoint.tensor(name)) == bits(dense[name])
    for module in TARGETS:
        packed = checkpoint.packed(module)
        packed.verify(module)
        weight = dense[module + ".weight"]
        assert bits(packed.unpack()) == bits(torch.where(packed.mask(), weight, torch.zeros_like(weight)))
    with pytest.raises(KeyError):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight")


def test_it_is_read_alike_whatever_torchs_default_device_is(sparse: Path, tmp_path: Path) -> None:
    expected, file = SparseCheckpoint.open(sparse), tmp_path / "masks.safetensors"
    with torch.device("meta"):
        checkpoint = SparseCheckpoint.open(sparse)
        layers = [checkpoint.packed(module).unpack() for module in TARGETS]
        checkpoint.mask_set().save(file)
        masks = MaskSet.load(file)
    assert [bits(layer) for layer in layers] == [bits(expected.packed(module).unpack()) for module in TARGETS]
    assert masks.digest() == expected.mask_set().digest()


def test_mask_set_is_the_one_it_was_made_from(sparse: Path, tmp_path: Path) -> None:
    masks = SparseCheckpoint.open(sparse).mask_set()
    made_from = magnitude_masks(sparse.with_name("tiny-dense"))
    assert masks.digest() == made_from.digest() == SparseCheckpoint.open(sparse).config.mask_digest
    assert masks.base_digest == made_from.base_digest
    masks.save(tmp_path / "m.safetensors")
    assert MaskSet.load(tmp_path / "m.safetensors").names == TARGETS


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "1:2", "2:16"])
def test_other_patterns(tmp_path: Path, pattern: str) -> None:
    nm = NMPattern.parse(pattern)
    checkpoint = SparseCheckpoint.open(sparse_dir(tmp_path / "s", pattern=nm))
    assert checkpoint.config.pattern == nm
    assert checkpoint.packed(TARGETS[0]).mask().float().mean() == nm.density


def test_shards(tmp_path: Path) -> None:
    one = SparseCheckpoint.open(sparse_dir(tmp_path / "one"))
    many = SparseCheckpoint.open(sparse_dir(tmp_path / "many", shard_bytes=3000))
    assert len({header.path for header in many.headers.values()}) > 3
    assert {name: bits(many.tensor(name)) for name in many.headers} == {
        name: bits(one.tensor(name)) for name in one.headers
    }
    assert many.config.mask_digest == one.config.mask_digest


def test_verify_bits_false_reads_headers_only(sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse, tmp_path / "s")
    edit_config(tmp_path / "s", lambda config: config["quantization_config"].update(mask_digest=RECIPE))
    with pytest.raises(FormatError, match="mask"):
        SparseCheckpoint.open(tmp_path / "s")
    assert SparseCheckpoint.open(tmp_path / "s", verify_bits=False).config.mask_digest == RECIPE


def test_a_symlinked_cache_opens(sparse: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for file in sparse.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert SparseCheckpoint.open(tmp_path / "snapshot").config.targets == TARGETS


def test_more_blocks_may_be_stored_than_are_run(tmp_path: Path) -> None:
    sparse_dir(tmp_path / "s", num_hidden_layers=LAYERS - 1)
    SparseCheckpoint.open(tmp_path / "s")


def test_dense_directories_are_not_sparse(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    assert not is_sparse_checkpoint(dense)
    with pytest.raises(FormatError, match=r"config\.json has no quantization_config: a dense model"):
        SparseCheckpoint.open(dense)


def test_is_sparse_checkpoint(sparse: Path, tmp_path: Path) -> None:
    assert is_sparse_checkpoint(sparse)
    assert is_sparse_checkpoint(str(sparse))
    assert not is_sparse_checkpoint(tmp_path)
    assert not is_sparse_checkpoint(tmp_path / "nothing")
    for section in ({"quant_method": "gptq"}, [], "sparse_nm", None):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
        assert not is_sparse_checkpoint(tmp_path)


def test_headers_of_a_dense_directory(tmp_path: Path) -> None:
    headers = read_headers(dense_dir(tmp_path / "dense", shard_bytes=5000))
    assert headers["lm_head.weight"].shape == (40, 32)
    assert headers["lm_head.weight"].dtype == "BF16"
    assert len({header.path for header in headers.values()}) > 1


def test_a_changed_value_is_found_by_the_digests_alone(tmp_path: Path) -> None:
    checkpoint = SparseCheckpoint.open(sparse_dir(tmp_path / "s", shard_bytes=5000))
    checkpoint.verify_digests()
    assert len(checkpoint.config.shards or ()) > 1
    shard = tmp_path / "s" / "model-00002-of-00005.safetensors"
    assert shard.name in (checkpoint.config.shards or ())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FormatError, match=rf"{shard.name}: digest sha256:\w+, but quantization_config says sha256:"):
        SparseCheckpoint.open(tmp_path / "s", verify_bits=False).verify_digests()

"""Dense directory + masks -> sparse checkpoint -> masked dense directory, bit for bit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.checkpoint import SparseCheckpoint, is_sparse_checkpoint
from maskgen.core.companions import SETTINGS_FILE
from maskgen.core.config import GUARD, WEIGHTS_KEY, SparseConfig
from maskgen.core.digest import digest_file
from maskgen.core.errors import FormatError, ModelError, NumericalError, OutputExistsError, PatternError
from maskgen.core.mask import MaskSet
from maskgen.core.packed import PackedTensor, StoredLayer
from maskgen.core.pattern import NMPattern
from maskgen.export import compress as compress_module
from maskgen.export.compress import compress, compress_masks, decompress, load_masks, model_label
from tests.directories import (
    COMPANIONS,
    RECIPE,
    TARGETS,
    TWO_FOUR,
    bits,
    dense_dir,
    edit_config,
    edit_tensors,
    magnitude_masks,
    read_all,
    sparse_dir,
)


def masked(dense: Path, masks: MaskSet) -> dict[str, bytes]:
    """The bytes of every tensor with +0 at the pruned weights: what compress and decompress must give back."""
    tensors = read_all(dense)
    for name in masks.names:
        tensors[name + ".weight"][~masks.mask(name)] = 0.0
    return {name: bits(tensor) for name, tensor in tensors.items()}


def manifest(masks: MaskSet, **changes: Any) -> SparseConfig:
    fields = {
        "pattern": masks.pattern,
        "targets": masks.names,
        "ignored": ("lm_head",),
        "mask_digest": masks.digest(),
        "recipe_digest": RECIPE,
        "base_model": "tiny",
        "base_digest": masks.base_digest,
    }
    return SparseConfig(**{**fields, **changes})


@pytest.mark.parametrize("shard_in, shard_out, shard_back", [(10**9, 10**9, 10**9), (4000, 3000, 5000), (1, 10**9, 1)])
def test_round_trip_is_masked_dense_bit_for_bit(tmp_path: Path, shard_in: int, shard_out: int, shard_back: int) -> None:
    dense = dense_dir(tmp_path / "dense", shard_bytes=shard_in)
    masks = magnitude_masks(dense)
    report = compress_masks(dense, masks, tmp_path / "sparse", ("lm_head",), shard_bytes=shard_out)
    written = decompress(tmp_path / "sparse", tmp_path / "again", shard_bytes=shard_back)
    again = {name: bits(tensor) for name, tensor in read_all(tmp_path / "again").items()}
    assert again == masked(dense, masks)
    assert written == sum(map(len, again.values()))
    assert report.total_bytes == sum(tensor.nbytes for tensor in read_all(tmp_path / "sparse").values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:16"])
def test_every_dtype_and_pattern(tmp_path: Path, dtype: torch.dtype, pattern: str) -> None:
    dense = dense_dir(tmp_path / "dense", dtype=dtype)
    masks = magnitude_masks(dense, NMPattern.parse(pattern))
    report = compress_masks(dense, masks, tmp_path / "sparse")
    assert report.ratio == masks.pattern.density + 1 / (8 * dtype.itemsize)
    decompress(tmp_path / "sparse", tmp_path / "again")
    assert {name: bits(tensor) for name, tensor in read_all(tmp_path / "again").items()} == masked(dense, masks)


def test_two_four_in_sixteen_bits_is_nine_sixteenths(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    report = compress_masks(dense, magnitude_masks(dense), tmp_path / "sparse")
    assert report.ratio == 0.5625
    assert report.targets == len(TARGETS)
    assert report.dense_target_bytes == 2 * 2 * (32 * 32 + 2 * 64 * 32)
    saved = sum(tensor.nbytes for tensor in read_all(dense).values()) - report.total_bytes
    assert saved == report.dense_target_bytes - report.packed_target_bytes


def test_what_travels_with_the_weights_and_what_does_not(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense", shard_bytes=4000)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "params.json"):
        (dense / name).write_text("{}")
    (dense / "folder.json").mkdir()
    compress_masks(dense, magnitude_masks(dense), tmp_path / "sparse")
    decompress(tmp_path / "sparse", tmp_path / "again")
    for out, record in ((tmp_path / "sparse", [SETTINGS_FILE]), (tmp_path / "again", [])):
        written = [*COMPANIONS, "config.json", "model.safetensors", *record]
        assert sorted(path.name for path in out.iterdir()) == sorted(written)
        assert all((out / name).read_bytes() == (dense / name).read_bytes() for name in COMPANIONS)


def test_config_gains_a_section_and_loses_it_again(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense", auto_map={"AutoModel": "modeling_custom.Tiny"}, unknown_key=[1, "ü"])
    masks = magnitude_masks(dense)
    compress_masks(dense, masks, tmp_path / "sparse", ("lm_head",))
    original = json.loads((dense / "config.json").read_text("utf-8"))
    written = json.loads((tmp_path / "sparse" / "config.json").read_text("utf-8"))
    section = written.pop("quantization_config")
    assert written.pop(WEIGHTS_KEY) == GUARD
    assert written == original
    shards = {"model.safetensors": digest_file(tmp_path / "sparse" / "model.safetensors")}
    assert section == replace(manifest(masks, base_model="dense"), shards=shards).to_dict()
    decompress(tmp_path / "sparse", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text("utf-8")) == original


def test_extra_json_is_written_beside(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    masks = magnitude_masks(dense)

    def pack(name: str, weight: Tensor) -> StoredLayer:
        return StoredLayer(PackedTensor.pack(weight, masks.mask(name), TWO_FOUR))

    compress(dense, manifest(masks), pack, tmp_path / "out", extra={"sparse_recipe.json": {"method": "wanda"}})
    assert json.loads((tmp_path / "out" / "sparse_recipe.json").read_text()) == {"method": "wanda"}
    SparseCheckpoint.open(tmp_path / "out")


def test_methods_that_change_weights(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    masks = magnitude_masks(dense)

    def pack(name: str, weight: Tensor) -> StoredLayer:
        return StoredLayer(PackedTensor.pack(weight * 2, masks.mask(name), TWO_FOUR, name))

    compress(dense, manifest(masks), pack, tmp_path / "out")
    weight = read_all(dense)[TARGETS[0] + ".weight"]
    expected = torch.where(masks.mask(TARGETS[0]), weight * 2, torch.zeros_like(weight))
    assert bits(SparseCheckpoint.open(tmp_path / "out").packed(TARGETS[0]).unpack()) == bits(expected)


@pytest.mark.parametrize(
    "change", [lambda weight: weight.float(), lambda weight: weight[:16], lambda weight: weight[:, :16]]
)
def test_dtype_and_shape_must_not_change(tmp_path: Path, change: Any) -> None:
    dense = dense_dir(tmp_path / "dense")
    masks = magnitude_masks(dense)

    def pack(name: str, weight: Tensor) -> StoredLayer:
        changed = change(weight)
        return StoredLayer(PackedTensor.pack(changed, TWO_FOUR.mask_from_scores(changed.float()), TWO_FOUR, name))

    with pytest.raises(ModelError, match=f"{TARGETS[0]}: .*dtype and shape must not change"):
        compress(dense, manifest(masks), pack, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    masks = magnitude_masks(dense_dir(tmp_path / "dense"))
    other = dense_dir(tmp_path / "other", seed=1)
    with pytest.raises(FormatError, match=f"other: digest sha256:.*, but the masks were made for {masks.base_digest}"):
        compress_masks(other, masks, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_survive_their_own_file_and_the_checkpoint(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    magnitude_masks(dense).save(tmp_path / "m.safetensors")
    compress_masks(dense, load_masks(tmp_path / "m.safetensors"), tmp_path / "one")
    compress_masks(dense, load_masks(tmp_path / "one"), tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    with pytest.raises(FormatError, match="no such file"):
        load_masks(tmp_path / "nothing")


def refused(dense: Path, masks: MaskSet, kind: type[Exception], message: str, **changes: Any) -> None:
    """Compression fails with one error and leaves nothing."""
    before = sorted(dense.parent.iterdir())

    def pack(name: str, weight: Tensor) -> StoredLayer:
        return StoredLayer(PackedTensor.pack(weight, masks.mask(name), masks.pattern, name))

    with pytest.raises(kind, match=message):
        compress(dense, manifest(masks, **changes), pack, dense.parent / "out")
    assert sorted(dense.parent.iterdir()) == before


def test_names_that_are_not_in_the_model(tmp_path: Path) -> None:
    masks = magnitude_masks(dense_dir(tmp_path / "dense"))
    for name in ("model.layers.9.mlp.up_proj", "model.norm.weight", "layers.0.mlp.up_proj"):
        refused(
            tmp_path / "dense", masks, ModelError, f"dense: no tensor {name}.weight, though {name} is", targets=(name,)
        )
        refused(tmp_path / "dense", masks, ModelError, f"no tensor {name}.weight, though {name} is", ignored=(name,))


def test_targets_that_cannot_be_packed(tmp_path: Path) -> None:
    masks = magnitude_masks(dense_dir(tmp_path / "dense"))
    refused(tmp_path / "dense", masks, ModelError, r"norm\.weight has shape \(32,\)", targets=("model.norm",))
    uneven = NMPattern(3, 6)
    refused(tmp_path / "dense", masks, PatternError, "in_features 64 is not a positive multiple of 24", pattern=uneven)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    edit_tensors(dense, lambda tensors: tensors[TARGETS[1] + ".weight"].fill_(float("inf")))
    refused(dense, magnitude_masks(dense), NumericalError, f"{TARGETS[1]}: kept weights hold NaN or infinity")


def test_weights_in_other_dtypes_are_named(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    edit_tensors(dense, lambda tensors: tensors.update({TARGETS[1] + ".weight": torch.ones(64, 32).double()}))
    refused(dense, magnitude_masks(dense), FormatError, f"{TARGETS[1]}: dtype torch.float64")


@pytest.mark.parametrize("suffix", [".values", ".bitmask"])
def test_names_the_format_needs_for_itself(tmp_path: Path, suffix: str) -> None:
    dense = dense_dir(tmp_path / "dense")
    edit_tensors(dense, lambda tensors: tensors.update({"quantizer" + suffix: torch.ones(3)}))
    refused(dense, magnitude_masks(dense), ModelError, f"'quantizer{suffix}': .* are reserved")


def test_what_open_would_refuse_is_not_written(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    masks = magnitude_masks(dense)
    edit_config(dense, lambda config: config.update(hidden_size=48))
    refused(dense, masks, FormatError, r"config\.json: hidden_size 48 is not a dimension")


def test_a_compressed_model_is_not_compressed_again(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "sparse")
    with pytest.raises(
        FormatError, match=r"already has a quantization_config \('sparse_nm'\); start from the dense model"
    ):
        compress_masks(sparse, MaskSet(TWO_FOUR, {"a": torch.ones(1, 1)}, _digest(sparse), RECIPE), tmp_path / "out")


def _digest(path: Path) -> str:
    return compress_module.digest_weights(path)


def test_a_dense_model_is_not_decompressed(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="a dense model"):
        decompress(dense_dir(tmp_path / "dense"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_byte_tensors_that_are_no_bitmasks_survive(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    table = torch.arange(9, dtype=torch.uint8)
    edit_tensors(dense, lambda tensors: tensors.update({"model.table": table}))
    compress_masks(dense, magnitude_masks(dense), tmp_path / "sparse")
    decompress(tmp_path / "sparse", tmp_path / "again")
    assert torch.equal(read_all(tmp_path / "again")["model.table"], table)


def test_existing_outputs_stay(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    with pytest.raises(OutputExistsError):
        compress_masks(dense, magnitude_masks(dense), dense)
    sparse = sparse_dir(tmp_path / "sparse")
    with pytest.raises(OutputExistsError):
        decompress(sparse, sparse)
    assert is_sparse_checkpoint(sparse)
    assert not is_sparse_checkpoint(dense)


def test_labels_name_the_directory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model-7b").mkdir()
    monkeypatch.chdir(tmp_path / "model-7b")
    assert model_label(Path()) == "model-7b"
    assert model_label(Path(os.sep)) == "model"

"""Checkpoints of other tools become ours, number by number. The files are made by `tests.foreign_files`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import ModelError, OutputExistsError
from maskgen.core.foreign import foreign_kind
from maskgen.core.pattern import NMPattern
from maskgen.export.convert import ConvertReport, convert
from tests import foreign_files, models
from tests.directories import edit_config, edit_tensors, read_all
from tests.foreign_files import ACTIVATIONS, BITMASK, LEFTOVER, QUANTISED, section

TWO_FOUR = NMPattern(2, 4)
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "dtype": torch.float32}
LAYERS = 7
Q = "model.layers.0.self_attn.q_proj"
Layer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]

STORED: dict[str, tuple[Any, Layer | None, str, str]] = {
    "leftover": (section("dense", None, LEFTOVER), None, "masked-dense weights", "float"),
    "bitmask": (section("dense", None, BITMASK), foreign_files.bitmask_floats, "sparse-24-bitmask", "float"),
    "bitmask-int8": (
        section("int-quantized", QUANTISED, BITMASK, input_activations=ACTIVATIONS),
        foreign_files.bitmask_codes(torch.int8, per_row=True),
        "sparse-24-bitmask",
        "int8",
    ),
    "bitmask-fp8": (
        section("float-quantized", {**QUANTISED, "type": "float", "strategy": "tensor"}, BITMASK),
        foreign_files.bitmask_codes(torch.float8_e4m3fn, per_row=False),
        "sparse-24-bitmask",
        "fp8_e4m3",
    ),
    "marlin-w4": (
        section("marlin-24", {**QUANTISED, "num_bits": 4, "strategy": "group", "group_size": 128}, LEFTOVER),
        foreign_files.marlin24(4, 128),
        "marlin-24",
        "float",
    ),
    "marlin-w4-rows": (
        section("marlin-24", {**QUANTISED, "num_bits": 4}, None),
        foreign_files.marlin24(4, None),
        "marlin-24",
        "int8",
    ),
    "marlin-w8": (
        section("marlin-24", QUANTISED, LEFTOVER),
        foreign_files.marlin24(8, None),
        "marlin-24",
        "int8",
    ),
    "marlin-w8-groups": (
        section("marlin-24", {**QUANTISED, "strategy": "group", "group_size": 128}, LEFTOVER),
        foreign_files.marlin24(8, 128),
        "marlin-24",
        "float",
    ),
}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of masked-dense weights, with -0 among the zeros, and groups of which one or no weight is kept."""
    return make_masked(tmp_path_factory.mktemp("masked") / "model")


def make_masked(path: Path, **changes: Any) -> Path:
    models.save("llama", path, **{**SHAPE, **changes})

    def mask(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".layers." in name and tensor.ndim == 2:
                tensor.mul_(TWO_FOUR.mask_from_scores(tensor.abs()))
                tensor[:3, :4] *= torch.tensor([0.0, 1.0, 1.0, 0.0])
                tensor[3] = 0.0
                tensor[3, 0] = 1.0

    edit_tensors(path, mask)
    return path


def converted(source: Path, out: Path, masks: Path | None = None) -> tuple[ConvertReport, dict[str, Tensor]]:
    """The report, and all weights as the result has them, dense, in float32."""
    report = convert(source, out, TWO_FOUR, masks)
    checkpoint = SparseCheckpoint.open(out)
    checkpoint.verify_digests()
    weights = {f"{name}.weight": checkpoint.packed(name).unpack().float() for name in checkpoint.config.targets}
    others = {name: checkpoint.tensor(name) for name in checkpoint.headers if name.endswith(("weight", "bias"))}
    return report, weights | others


def assert_same(found: dict[str, Tensor], meant: dict[str, Tensor]) -> None:
    assert set(found) == set(meant)
    for name, tensor in meant.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", STORED)
def test_every_number_is_the_same(masked: Path, tmp_path: Path, kind: str) -> None:
    config, layer, name, values = STORED[kind]
    meant = foreign_files.rewrite(masked, tmp_path / "source", config, layer)
    report, found = converted(tmp_path / "source", tmp_path / "out")
    assert (report.found, report.targets, report.values, report.dense) == (name, LAYERS, values, {})
    assert_same(found, meant)
    assert SparseCheckpoint.open(tmp_path / "out").config.ignored == ("lm_head",)


def test_minus_128_is_among_the_codes(masked: Path, tmp_path: Path) -> None:
    """Otherwise the test above would not show that it is kept."""
    config, layer, _, _ = STORED["bitmask-int8"]
    foreign_files.rewrite(masked, tmp_path / "source", config, layer)
    assert (read_all(tmp_path / "source")[f"{Q}.compressed"] == -128).any()


@pytest.mark.parametrize("kind", ["sparse-24-bitmask", "marlin-24", "masked-dense", "leftover", None])
def test_a_server_knows_what_to_convert(masked: Path, tmp_path: Path, kind: str | None) -> None:
    name = {"sparse-24-bitmask": "bitmask-fp8", "marlin-24": "marlin-w8", "masked-dense": "leftover"}.get(str(kind))
    if name is not None:
        foreign_files.rewrite(masked, tmp_path / "source", *STORED[name][:2])
    else:
        models.save("llama", tmp_path / "source", **SHAPE)
    if kind == "leftover":
        edit_config(tmp_path / "source", lambda it: it.update(quantization_config=STORED["leftover"][0]))
    assert foreign_kind(tmp_path / "source") == kind
    assert foreign_kind(masked) == "masked-dense"


def test_a_server_leaves_alone_what_only_its_engine_reads(masked: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(masked, tmp_path / "other"))
    (other / "model.safetensors").rename(other / "consolidated.safetensors")
    assert foreign_kind(other) is None
    (other / "model.safetensors").write_bytes(b"cut off")
    assert foreign_kind(other) is None
    assert foreign_kind(tmp_path) is None


def test_masked_codes_without_a_sparse_layout(masked: Path, tmp_path: Path) -> None:
    def layer(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round().to(torch.int8)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale

    meant = foreign_files.rewrite(masked, tmp_path / "s", section("int-quantized", QUANTISED, LEFTOVER), layer)
    report, found = converted(tmp_path / "s", tmp_path / "out")
    assert (report.targets, report.values) == (LAYERS, "int8")
    assert_same(found, meant)


def test_codes_of_metadata_are_those_of_torch() -> None:
    """Which orders the rows in another way: that of CUTLASS, where Sparse-Marlin has one of its own."""
    from torch.sparse import _semi_structured_conversions as theirs

    weight = torch.randint(1, 8, (192, 128), generator=torch.Generator().manual_seed(0)).half()
    weight *= TWO_FOUR.mask_from_scores(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)))
    kept, meta = foreign_files.marlin_metadata(weight.int().tolist())
    their_kept, their_meta = theirs.sparse_semi_structured_from_dense_cutlass(weight)
    places = theirs._calculate_meta_reordering_scatter_offsets(192, 8, torch.int16, "cpu")
    ours = [meta.reshape(-1)[foreign_files.reordered(row, word, 192)] for row in range(192) for word in range(8)]
    assert torch.equal(torch.tensor(kept), their_kept.int())
    assert torch.equal(torch.stack(ours), their_meta.reshape(-1)[places])


def test_learned_masks(tmp_path: Path) -> None:
    masked = make_masked(tmp_path / "masked")
    models.save("llama", tmp_path / "dense", **SHAPE)
    masks = {
        name: tensor.ne(0)
        for name, tensor in read_all(masked).items()
        if ".layers." in name and tensor.ndim == 2 and "o_proj" not in name
    }
    foreign_files.maskllm_archive(masks, tmp_path / "masks.npz")
    meant = read_all(tmp_path / "dense")
    meant |= {name: meant[name] * mask for name, mask in masks.items()}
    report, found = converted(tmp_path / "dense", tmp_path / "out", tmp_path / "masks.npz")
    assert (report.found, report.targets) == ("MaskLLM masks", LAYERS - 1)
    assert report.dense == {"model.layers.0.self_attn.o_proj": "does not follow 2:4"}
    assert_same(found, meant)


def test_a_layer_that_does_not_follow_stays_dense_with_those_served_as_one(tmp_path: Path) -> None:
    masked = make_masked(tmp_path / "masked")
    edit_tensors(masked, lambda tensors: tensors[f"{Q}.weight"][5, :3].fill_(1.0))
    meant = read_all(masked)
    report, found = converted(masked, tmp_path / "out")
    assert report.targets == LAYERS - 3
    assert {name.rpartition(".")[2]: why for name, why in report.dense.items()} == {
        "q_proj": "does not follow 2:4",
        "k_proj": "served as one with q_proj, which does not follow 2:4",
        "v_proj": "served as one with q_proj, which does not follow 2:4",
    }
    assert_same(found, meant)


def test_layers_of_codes_that_stay_dense_become_floats(masked: Path, tmp_path: Path) -> None:
    """And those of which some are codes and some are not."""
    codes = foreign_files.bitmask_codes(torch.int8, per_row=False)

    def layer(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return (
            codes(module, weight) if "mlp" in module else ({"weight": weight + (weight == 0)}, weight + (weight == 0))
        )

    meant = foreign_files.rewrite(masked, tmp_path / "s", section("int-quantized", QUANTISED, BITMASK), layer)
    report, found = converted(tmp_path / "s", tmp_path / "out")
    assert (report.targets, report.values, len(report.dense)) == (3, "int8", 4)
    assert_same(found, meant)

    def mixed(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return codes(module, weight) if "mlp" in module else foreign_files.bitmask_floats(module, weight)

    meant = foreign_files.rewrite(masked, tmp_path / "m", section("int-quantized", QUANTISED, BITMASK), mixed)
    report, found = converted(tmp_path / "m", tmp_path / "both")
    assert (report.targets, report.values) == (LAYERS, "float")
    assert report.notes == ["some layers have 8-bit codes and others have not, so all are stored as float32"]
    assert_same(found, meant)


def test_an_older_checkpoint_of_ours_is_written_again(masked: Path, tmp_path: Path) -> None:
    convert(masked, tmp_path / "new", TWO_FOUR)
    config = SparseCheckpoint.open(tmp_path / "new").config

    def older(hf_config: dict[str, Any]) -> None:
        del hf_config["quantization_config"]["shards"]
        hf_config["quantization_config"]["format_version"] = 2

    edit_config(tmp_path / "new", older)
    report, found = converted(tmp_path / "new", tmp_path / "again")
    assert (report.found, report.targets) == ("sparse_nm", LAYERS)
    assert SparseCheckpoint.open(tmp_path / "again").config == config
    assert_same(found, {name: tensor + 0.0 for name, tensor in read_all(masked).items()})


def test_a_dense_model_is_refused(tmp_path: Path, masked: Path) -> None:
    models.save("llama", tmp_path / "dense", **SHAPE)
    with pytest.raises(ModelError, match=r"dense: nothing to convert: of 7 layers none is sparse, such as .*q_proj"):
        convert(tmp_path / "dense", tmp_path / "out", TWO_FOUR)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExistsError):
        convert(masked, tmp_path / "taken", TWO_FOUR)
    assert not (tmp_path / "out").exists()

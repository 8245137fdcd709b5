"""Corrections and replaced tensors through compress and decompress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.config import SparseConfig
from maskgen.core.correction import CorrectionConfig, LowRankCorrection, PooledCorrection
from maskgen.core.errors import FormatError, ModelError, NumericalError
from maskgen.core.packed import Correction, PackedTensor, StoredLayer
from maskgen.export.compress import check_source, compress, decompress
from tests.directories import (
    RECIPE,
    TARGETS,
    TWO_FOUR,
    bits,
    corrected_dir,
    dense_dir,
    edit_tensors,
    magnitude_masks,
    read_all,
)

FIXED, TRAINED = PooledCorrection(8, "fixed"), PooledCorrection(8, "trained")
LOW_RANK = LowRankCorrection(5)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_dir(tmp_path / "dense")


def write(dense: Path, out: Path, correction: Any = None, form: CorrectionConfig | None = None, **options: Any) -> Any:
    """Compress with magnitude masks; `correction(name, weight)` gives each layer's."""
    masks = magnitude_masks(dense)
    config = SparseConfig(
        TWO_FOUR, TARGETS, ("lm_head",), masks.digest(), RECIPE, "tiny", masks.base_digest, correction=form
    )

    def pack(name: str, weight_OI: Tensor) -> StoredLayer:
        packed = PackedTensor.pack(weight_OI, masks.mask(name), TWO_FOUR)
        return StoredLayer(packed, None if correction is None else correction(name, weight_OI))

    return compress(dense, config, pack, out, **options)


@pytest.mark.parametrize("form", [FIXED, TRAINED, LOW_RANK], ids=str)
@pytest.mark.parametrize("values", ["float", "int8"])
def test_decompress_folds_the_correction_in(tmp_path: Path, form: CorrectionConfig, values: str) -> None:
    checkpoint = SparseCheckpoint.open(corrected_dir(tmp_path / "sparse", values, form))
    decompress(tmp_path / "sparse", tmp_path / "folded")
    folded = read_all(tmp_path / "folded")
    assert set(folded) == set(read_all(tmp_path / "sparse-dense"))
    for name in TARGETS:
        layer = checkpoint.layer(name)
        assert layer.correction is not None and (layer.correction.pool is not None) == form.stores_pool
        out, pool = layer.correction.out.float(), layer.correction.pool
        inputs = layer.packed.shape[1]
        ones = torch.eye(inputs // 8).repeat_interleave(8, dim=1) if pool is None else pool.float()
        expected = (layer.packed.unpack().float() + out @ ones).bfloat16()
        torch.testing.assert_close(folded[name + ".weight"], expected, rtol=0, atol=0)


def test_a_correction_is_stored_in_the_dtype_of_the_weight(dense: Path, tmp_path: Path) -> None:
    out = torch.full((64, 8), 1.001, dtype=torch.float64, requires_grad=True)
    report = write(dense, tmp_path / "out", lambda name, w: Correction(out[: w.shape[0], : w.shape[1] // 8]), FIXED)
    checkpoint = SparseCheckpoint.open(tmp_path / "out")
    assert {checkpoint.headers[name + ".correction_out"].dtype for name in TARGETS} == {"BF16"}
    assert report.packed_target_bytes == sum(checkpoint.layer(name).nbytes for name in TARGETS)
    assert report.ratio == 0.5625 + 1 / 8


@pytest.mark.parametrize(
    ("correction", "form", "message"),
    [
        (None, FIXED, r"None, but the manifest's .* implies \(\[32, 8\], None\)"),
        (lambda w: Correction(torch.ones(w.shape[0], w.shape[1] // 8)), None, "implies None"),
        (
            lambda w: Correction(torch.ones(w.shape[0], w.shape[1] // 8)),
            TRAINED,
            r"\(\[32, 8\], None\), but .* \(\[32, 8\], \[8, 64\]\)",
        ),
        (lambda w: Correction(torch.ones(w.shape[0], w.shape[1] // 4)), FIXED, r"\(\[32, 16\], None\), but"),
        (lambda w: Correction(torch.ones(w.shape[0], 4), torch.ones(4, 8)), TRAINED, r"\[4, 8\]\), but"),
    ],
)
def test_corrections_that_are_not_what_the_manifest_says(
    dense: Path, tmp_path: Path, correction: Any, form: CorrectionConfig | None, message: str
) -> None:
    def of_up(name: str, weight: Tensor) -> Correction | None:
        return correction(weight) if correction is not None else None

    with pytest.raises(ModelError, match=f"down_proj: correction of shapes .*{message}"):
        write(dense, tmp_path / "out", of_up, form)
    assert not (tmp_path / "out").exists()


def test_segments_that_do_not_divide_the_inputs(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="input features are no multiple of the correction's segment of 24"):
        write(dense, tmp_path / "out", None, PooledCorrection(24, "fixed"))


def test_corrections_that_are_not_finite(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="the correction holds NaN or infinity"):
        write(dense, tmp_path / "out", lambda name, w: Correction(torch.full((w.shape[0], 4), float("nan"))), FIXED)
    with pytest.raises(NumericalError, match="the correction holds NaN or infinity"):  # after rounding to the dtype
        half = dense_dir(tmp_path / "half", dtype=torch.float16)
        write(half, tmp_path / "out", lambda name, w: Correction(torch.full((w.shape[0], 4), 1e6)), FIXED)


def test_other_tensors_are_replaced(dense: Path, tmp_path: Path) -> None:
    """Norms, biases and embeddings that were trained too, in float32 and with gradients."""
    names = ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight")
    before = read_all(dense)
    others = {name: (before[name].float() * 3).requires_grad_() for name in names}
    write(dense, tmp_path / "out", others=others)
    after = read_all(tmp_path / "out")
    for name, tensor in before.items():
        if name in after:
            assert bits(after[name]) == bits(tensor * 3 if name in names else tensor), name
            assert after[name].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.norm", (32,), "no tensor of that name besides the targets"),
        (TARGETS[0] + ".weight", (32, 64), "no tensor of that name besides the targets"),
        ("model.norm.weight", (33,), r"'model\.norm\.weight' \(33,\) is to be replaced, but it has shape \(32,\)"),
    ],
)
def test_others_that_have_no_place(dense: Path, tmp_path: Path, name: str, shape: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write(dense, tmp_path / "out", others={name: torch.ones(shape)})
    assert not (tmp_path / "out").exists()


def test_names_that_packed_tensors_need(dense: Path, tmp_path: Path) -> None:
    edit_tensors(dense, lambda tensors: tensors.update({"model.norm.scale": torch.ones(32)}))
    check_source(dense, TWO_FOUR, TARGETS, ())
    write(dense, tmp_path / "float")
    masks = magnitude_masks(dense)
    config = SparseConfig(TWO_FOUR, TARGETS, (), masks.digest(), RECIPE, "tiny", masks.base_digest, "int8")
    with pytest.raises(ModelError, match=r"'model\.norm\.scale': \.values and \.bitmask and \.scale are reserved"):
        compress(
            dense,
            config,
            lambda name, weight: StoredLayer(PackedTensor.pack(weight, masks.mask(name), TWO_FOUR)),
            tmp_path / "codes",
        )

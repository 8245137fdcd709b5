"""Layers that are served as one, and their bytes, against what a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import CorrectionConfig, LowRankCorrection, PooledCorrection
from maskgen.core.layout import LayerForm
from maskgen.core.pattern import NMPattern
from maskgen.export.quantise import quantise
from maskgen.hf.fused import served_layers
from maskgen.hf.planning import plan_of
from tests import models

ModelDir = Callable[..., Path]


@pytest.mark.parametrize("form", [None, LowRankCorrection(3), PooledCorrection(8, "fixed")], ids=str)
@pytest.mark.parametrize(
    ("dtype", "values", "group"),
    [
        (torch.float32, "float", None), (torch.bfloat16, "float", None), (torch.bfloat16, "int8", None),
        (torch.bfloat16, "fp8_e4m3", None), (torch.bfloat16, "int4", 64), (torch.bfloat16, "int4", None),
    ],
)  # fmt: skip
def test_bytes_are_those_of_a_checkpoint(
    dtype: torch.dtype,
    values: str,
    group: int | None,
    form: CorrectionConfig | None,
    model_dir: ModelDir,
    tmp_path: Path,
) -> None:
    dense, pattern = model_dir("llama", dtype=dtype), NMPattern(2, 4)
    models.save_corrected(dense, tmp_path / "floats", form)
    if values == "float":
        (tmp_path / "floats").rename(tmp_path / "sparse")
    else:
        quantise(tmp_path / "floats", tmp_path / "sparse", values, group)
    checkpoint, todo = SparseCheckpoint.open(tmp_path / "sparse"), plan_of(dense, pattern)
    sizes = dict.fromkeys(checkpoint.config.targets, dtype.itemsize)
    layers = served_layers(todo.targets, todo.groups, LayerForm(pattern, values, form, group), sizes)
    assert [layer.block for layer in layers] == [block for block in range(models.LAYERS) for _ in range(4)]
    assert layers[2].name == "model.layers.0.mlp.gate_proj+up_proj"
    assert (layers[0].out_features, layers[0].in_features) == (128, 64)
    assert sorted(name for layer in layers for name in layer.layers) == sorted(checkpoint.config.targets)
    for layer in layers:
        stored = [checkpoint.layer(name) for name in layer.layers]
        assert layer.sparse_bytes - layer.correction_bytes == sum(one.packed.nbytes for one in stored)
        assert layer.correction_bytes == sum(one.nbytes - one.packed.nbytes for one in stored)
        assert layer.dense_bytes == sum(one.packed.dense_nbytes(dtype) for one in stored)


def test_where_engines_fuse_nothing_every_layer_is_alone(model_dir: ModelDir) -> None:
    todo = plan_of(model_dir("opt"), NMPattern(2, 4))
    sizes = {name: 4 for block in todo.targets for name in block}
    layers = served_layers(todo.targets, (), LayerForm(NMPattern(2, 4)), sizes)
    assert all(len(layer.layers) == 1 for layer in layers) and len(layers) == 6 * models.LAYERS

"""Times of layers as `sparse-serve tune` keeps them: read, used for a budget of time, and refused when damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import maskgen
from maskgen.core.errors import FormatError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.hf.fused import ServedLayer
from maskgen.sweep.kernel_times import speedup_of, times_of
from maskgen.sweep.search import within_time

ModelDir = Callable[..., Path]
LAYER = ServedLayer(0, ("q", "k"), 16, 8, 256, 144)
SHAPES = {(128, 64): 2.0, (64, 64): 0.9, (192, 64): 1.6, (64, 96): 2.5}
"""Of the tiny Llama; how many times as fast a layer is sparse."""


def write(folder: Path, out_features: int, in_features: int, speedup: float, **changes: Any) -> Path:
    layer = {"out_features": out_features, "in_features": in_features, "pattern": "2:4", "dtype": "torch.float32"}
    dense_s = out_features * in_features * 1e-9
    seconds = {"1": {"dense": dense_s, "cpu": dense_s / speedup, "reference": dense_s * 9}}
    file = folder / f"{out_features}-{in_features}-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps({"layer": {**layer, "values": "float"}, "seconds": seconds, **changes}))
    return file


def test_the_newest_file_of_the_right_layer_counts(tmp_path: Path) -> None:
    old, new = write(tmp_path, 16, 8, 1.5), write(tmp_path, 16, 8, 2.0)
    write(tmp_path, 16, 16, 4.0)
    os.utime(old, ns=(1, 1))
    os.utime(new, ns=(2, 2))
    assert times_of(tmp_path, [LAYER], NMPattern(2, 4), "float32") == [(128, 64)]
    with pytest.raises(RecipeError, match=r"no times of a layer 16 x 8, 2:4, bfloat16 \(q\+k\)"):
        times_of(tmp_path, [LAYER], NMPattern(2, 4), "bfloat16")


@pytest.mark.parametrize(
    "seconds",
    [{"1": {"dense": 1.0}}, {"1": {"cpu": 1.0}}, {"1": {"dense": 1.0, "cpu": -1.0}}, {"1": {"dense": "1"}}, 3],
)
def test_damaged_times_are_refused_by_file(seconds: Any, tmp_path: Path) -> None:
    file = write(tmp_path, 16, 8, 2.0, seconds=seconds)
    with pytest.raises(FormatError, match=f"{file.name}: "):
        times_of(tmp_path, [LAYER], NMPattern(2, 4), "float32")
    with pytest.raises(FormatError, match="nowhere: no such directory"):
        times_of(tmp_path / "nowhere", [LAYER], NMPattern(2, 4), "float32")


def test_layers_that_are_slower_sparse_make_room() -> None:
    times = [(100, 50), (100, 130), (100, 40), (100, 60)]
    kept = within_time([0.4, 0.01, 0.3, 0.2], times, 1.25)
    assert kept[1] and kept[0] and speedup_of(times, kept) >= 1.25


def test_a_budget_of_time_is_met(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "times").mkdir()
    for shape, speedup in SHAPES.items():
        write(tmp_path / "times", *shape, speedup)

    def request(speedup: float) -> maskgen.PruneRequest:
        return maskgen.PruneRequest(
            recipe="magnitude",
            model=model_dir(),
            data=text_file,
            out=tmp_path / "out",
            overrides={"calibration.window_tokens": 32, "calibration.samples": 6},
            speedup=speedup,
            kernel_table=tmp_path / "times",
        )

    with pytest.raises(RecipeError, match=r"budget.speedup 3: .* the nearest budget that can be met is 1\.\d+"):
        maskgen.prune(request(3.0))
    assert not (tmp_path / "out.work").exists()
    made = maskgen.prune(request(1.3))
    assert isinstance(made, maskgen.PruneResult) and made.allocation is not None
    spent = made.allocation
    assert spent.speedup is not None and 1.3 <= spent.speedup < 1.45
    by_shape = {(layer.dense_bytes, layer.dense) for layer in spent.layers}
    assert (64 * 64 * 4, False) not in by_shape, "what is slower sparse stays dense"

"""The memory benchmark of MaskLLM still runs: every variant trains the logits of a tiny model, and has its peaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskgen.hf import model
from maskgen.methods.learned.maskllm import MaskLLMLinear
from tests.bench.mask_memory import VARIANTS, allocated_peak, measure, prepare
from tests.bench.sweep_cost import build

LOGIT_BYTES = 6 * 4
"""Of a group of four weights, in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build(path, 128, 1)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_the_logits_of_all_layers(variant: str, folder: Path) -> None:
    net = model.load(folder)
    step, weights = prepare(net, variant, 1, 16)
    layers = [module for module in net.modules() if isinstance(module, MaskLLMLinear)]
    before = [layer.logits.detach().clone() for layer in layers]
    assert sum(layer.weight.numel() for layer in layers) == weights > 0
    assert allocated_peak(lambda: step(0)) > 0
    assert all(not layer.logits.equal(logits) for layer, logits in zip(layers, before, strict=True))


def test_a_measurement_has_its_numbers(folder: Path) -> None:
    row = measure("plain", str(folder), 1, 16)
    groups = row["million_weights"] * 1e6 / 4
    assert row["peak_tensor_bytes"] > groups * LOGIT_BYTES
    assert row["peak_process_bytes"] > 0 and row["step_s"] > 0

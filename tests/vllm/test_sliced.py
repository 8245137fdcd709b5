"""Structured and N:M pruning together on real vLLM: a sliced model is stock, and a sparse one of it is ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maskgen.export import slice as slice_module
from maskgen.export.compress import decompress
from maskgen.hf import model as loader
from maskgen.numerics.units import HEADS
from tests import models
from tests.vllm.offline import SHAPE, greedy, serve, transformers_oracle

SHAPES: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"head_dim": 32, "num_key_value_heads": 4}}


def slice_model(kind: str, root: Path) -> Path:
    """One key-value group less and a third of the neurons less, in every layer others.

    That leaves the Qwen3 three heads, which do not divide its hidden size.
    """
    dense, sliced = models.save(kind, root / "dense", **SHAPE, **SHAPES[kind]), root / "sliced"
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for name, count in slice_module.units(loader.load(dense)).items():
        order = torch.randperm(count, generator=generator)
        kept[name] = order < (count - 1 if name.endswith(HEADS) else count * 2 // 3)
    slice_module.write(dense, sliced, {}, kept)
    return sliced


@pytest.mark.parametrize("kind", SHAPES)
def test_a_sliced_model_is_served_dense_and_sparse(kind: str, tmp_path: Path) -> None:
    sliced = slice_model(kind, tmp_path)
    models.save_sparse(sliced, tmp_path / "sparse")
    decompress(tmp_path / "sparse", tmp_path / "masked")
    for served, oracle in ((sliced, sliced), (tmp_path / "sparse", tmp_path / "masked")):
        expected, _ = transformers_oracle(oracle)
        assert len({token for sequence in expected for token in sequence}) > 6, "a constant would hide a mistake"
        with serve(served) as llm:
            assert greedy(llm) == expected

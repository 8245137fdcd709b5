"""What is said of weights, by what workers and a first step tell of them; whole starts are in tests/vllm."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparse_serve.engine.vllm_weights import WeightChecks
from sparse_serve.runtime.errors import EngineStartError

EVEN = 1 / 400
SURE, ALLOWED = WeightChecks(), WeightChecks(allow_zeros=True)


def test_a_dense_model_that_vllm_may_read_and_we_do_not_is_left_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"a": torch.ones(4, 4), "b": torch.ones(4, 4)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with caplog.at_level(logging.WARNING):
        SURE.check_files(str(tmp_path), "auto")
    assert "not looked for weights that are zeros" in caplog.text and "model.safetensors.index.json" in caplog.text


def test_parameters_that_no_rank_may_hold() -> None:
    sound, broken = {"not_finite": [], "zero_norms": []}, {"not_finite": ["a", "b"], "zero_norms": []}
    for checks in (SURE, ALLOWED):
        checks.check_loaded("dir", [sound, sound])
        with pytest.raises(EngineStartError, match="2 parameters of dir hold NaN or infinity, such as a; download"):
            checks.check_loaded("dir", [sound, broken])


def test_norms_of_zeros_unless_they_are_meant() -> None:
    ranks = [{"not_finite": [], "zero_norms": ["model.norm.weight"]}] * 2
    ALLOWED.check_loaded("dir", ranks)
    with pytest.raises(EngineStartError, match=r"1 norms of dir hold nothing but zeros, such as model\.norm\.weight; "):
        SURE.check_loaded("dir", ranks)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("even", "what"), [(EVEN, "the log-probability of a first token is"), (None, "an embedding")])
def test_an_answer_that_is_no_number(wrong: float, even: float | None, what: str) -> None:
    for checks in (SURE, ALLOWED):
        with pytest.raises(EngineStartError, match=f"{what}.* in torch.float16; try"):
            checks.check_answer([-1.0, wrong], even, "torch.float16")


def test_logits_that_are_all_equal_unless_they_are_meant() -> None:
    flat = [math.log(EVEN)] * 3
    ALLOWED.check_answer(flat, EVEN, "torch.float32")
    with pytest.raises(EngineStartError, match="every token is as likely as any other"):
        SURE.check_answer(flat, EVEN, "torch.float32")
    SURE.check_answer([flat[0], flat[0] + 5e-6, flat[0]], EVEN, "torch.float32")
    SURE.check_answer([0.0, 0.0], None, "torch.float32")

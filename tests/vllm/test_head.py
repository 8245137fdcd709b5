"""The output layer in int8, on real vLLM: against transformers with the same rounding, and where there is none.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparse_serve.kernels import cpu
from tests.vllm.offline import PROMPTS, make_sparse, prompt_logprobs, serve


def rounded(value: Tensor) -> Tensor:
    """Every row by the nearest of 255 steps up to its largest."""
    step = value.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (value / step).round() * step


@torch.no_grad()
def with_rounded_head(masked: Path) -> tuple[list[float], list[float]]:
    """Log-probabilities of `PROMPTS` by transformers, as they are and with the output layer's weight in int8."""
    model = AutoModelForCausalLM.from_pretrained(masked, dtype=torch.float32)
    found: tuple[list[float], list[float]] = ([], [])
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        hidden_TI = model.model(ids).last_hidden_state[0, :-1]
        weight_OI = model.lm_head.weight
        for logits_TO, into in (
            (hidden_TI @ weight_OI.T, found[0]),
            (hidden_TI @ rounded(weight_OI).T, found[1]),
        ):
            into += logits_TO.log_softmax(-1).gather(1, ids[0, 1:, None]).flatten().tolist()
    return found


needs_vnni = pytest.mark.skipif(cpu.dense_int8_problem() is not None, reason=cpu.dense_int8_problem() or "")


@needs_vnni
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_only_the_weight_of_the_output_layer_is_rounded(kind: str, tmp_path: Path) -> None:
    sparse, masked = make_sparse(kind, tmp_path)
    exact, expected = with_rounded_head(masked)
    with serve(sparse, lm_head="int8") as llm:
        found = prompt_logprobs(llm)
    assert found == pytest.approx(expected, abs=5e-4)
    assert found != pytest.approx(exact, abs=5e-4)


def test_a_model_without_an_output_layer_of_its_own_is_refused(tmp_path: Path) -> None:
    sparse, _ = make_sparse("opt", tmp_path)
    with (
        pytest.raises(Exception, match=r"has no output layer of its own.*leave lm_head out"),
        serve(sparse, lm_head="int8"),
    ):
        pass


def test_an_output_layer_of_another_dtype_is_refused(tmp_path: Path) -> None:
    """vLLM would multiply by the weight as it was loaded."""
    sparse, _ = make_sparse("llama", tmp_path)
    with (
        pytest.raises(Exception, match=r"the output layer is asked for in torch.float32 .*; leave one of them out"),
        serve(sparse, "bfloat16", lm_head="int8", hf_overrides={"head_dtype": "float32"}),
    ):
        pass


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_keep_their_digits_and_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    from sparse_serve.plugin.head import Int8HeadMethod

    torch.manual_seed(0)
    layer, method = nn.Linear(64, 256, bias=False, dtype=dtype), Int8HeadMethod("lm_head")
    weight_OI = rounded(layer.weight.detach().float())
    method.process_weights_after_loading(layer)
    x_TI = torch.randn(5, 64, dtype=dtype)
    x_TI[1, 3] = 1000  # one that leaves the others few steps
    x_TI[2] = 0
    expected_TO = x_TI.float() @ weight_OI.T
    y_TO = method.apply(layer, x_TI, torch.ones(256, dtype=dtype)).float() - 1
    error_T = (y_TO - expected_TO).norm(dim=1) / expected_TO.norm(dim=1).clamp(min=1)
    assert float(error_T.max()) < (0.006 if dtype is torch.bfloat16 else 1e-3)
    x_TI[3, 0], x_TI[4, 0] = torch.nan, torch.inf
    again_TO = method.apply(layer, x_TI)
    assert bool(again_TO[3:].isnan().all()) and bool(again_TO[:3].isfinite().all())


def test_it_is_for_cpus() -> None:
    from sparse_serve.plugin.head import Int8HeadMethod

    layer = nn.Linear(8, 4, device="meta")
    with pytest.raises(Exception, match="lm_head 'int8' is for CPUs, and lm_head is on meta; leave it out"):
        Int8HeadMethod("lm_head").process_weights_after_loading(layer)

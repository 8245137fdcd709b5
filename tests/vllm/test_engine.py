"""The engine on its own, as the gate uses it: scores, and kernels that cannot serve."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sparse_serve.engine.vllm_engine import VllmEngine
from sparse_serve.runtime.errors import BadRequestError, EngineStartError
from tests import models
from tests.vllm.serving import SHAPE, SPARSE_LAYERS, command_of, descendants, is_alive, make_checkpoint


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--dtype=float32"], "skinny: device cpu is not an NVIDIA GPU, dtype torch.float32 is not one of"),
        (["--tensor-parallel-size=2", "--dtype=bfloat16"], "skinny: device cpu is not an NVIDIA GPU$"),
    ],
)
async def test_a_kernel_that_cannot_serve_is_an_error_with_its_reasons(
    flags: list[str], why: str, tmp_path: Path
) -> None:
    forced = json.dumps({"sparse_nm": {"kernel": "skinny"}})
    engine = VllmEngine(str(make_checkpoint(tmp_path)), [f"--additional-config={forced}", *flags])
    with pytest.raises(EngineStartError, match=f"the engine did not start: no kernel for a 2:4 weight.*{why}"):
        await engine.start()


async def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    """The engine as the gate uses it, and a dense float32 model, which "auto" must not turn into bfloat16."""
    dense = models.build("llama", **SHAPE)
    models.save("llama", tmp_path / "dense", **SHAPE)
    engine = VllmEngine(str(tmp_path / "dense"))
    family = descendants(os.getpid())
    try:
        info = await engine.start()
        family = descendants(os.getpid()) - family
        engines = [pid for pid in family if "EngineCore" in command_of(pid)]
        assert (info.dtype, info.sparse_layers, info.dense_layers) == ("float32", 0, SPARSE_LAYERS)
        ids = models.tokenizer().encode(models.TEXT, add_special_tokens=False)[:400]
        scores = await engine.score(ids)
        with pytest.raises(BadRequestError, match="expected 2 to 1023"):
            await engine.score([5])
    finally:
        await engine.stop(5.0)
    with torch.no_grad():
        logits = dense(torch.tensor([ids])).logits[0].float()
    expected = logits.log_softmax(-1)[range(399), ids[1:]]
    assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert engines and not any(map(is_alive, engines))

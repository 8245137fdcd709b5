"""A sparse model that vLLM compiles: the whole graph in one piece, kernels in it as opaque operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sparse_serve.plugin.kept_code import OURS
from tests import models
from tests.vllm.offline import NEW_TOKENS, PROMPTS, SHAPE, make_sparse, transformers_oracle

PROGRAM = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, max_num_seqs=4, gpu_memory_utilization=0.3,
              kv_cache_memory_bytes=1 << 28, additional_config={"sparse_nm": {"kernel": sys.argv[2]}})
    sampling = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[4])]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    print("tokens", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""
SAVED, LOADED = "saved AOT compiled function", "Directly load AOT compilation"


Say = Callable[[Path, str], str]


@pytest.fixture
def said(tmp_path: Path) -> Say:
    """What a process prints that serves a model: its tokens are those of `oracle`.

    In processes of their own: the other tests of this folder switch compilation off, since it takes its time.
    """
    (tmp_path / "compiled.py").write_text(PROGRAM)
    environment = os.environ | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    del environment["TORCHDYNAMO_DISABLE"]

    def run(model: Path, kernel: str) -> str:
        command = [sys.executable, "compiled.py", str(model), kernel, str(NEW_TOKENS), json.dumps(PROMPTS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def tokens(output: str) -> list[list[int]]:
    (line,) = (line for line in output.splitlines() if line.startswith("tokens "))
    return list(json.loads(line.removeprefix("tokens ")))


@pytest.mark.timeout(900)
def test_a_compiled_model_says_what_transformers_says_and_is_compiled_once(tmp_path: Path, said: Say) -> None:
    sparse, masked = make_sparse("llama", tmp_path)
    first, second, other_kernel = said(sparse, "cpu"), said(sparse, "cpu"), said(sparse, "reference")
    assert tokens(first) == tokens(second) == tokens(other_kernel) == transformers_oracle(masked)[0]
    assert SAVED in first and LOADED not in first
    assert LOADED in second and SAVED not in second
    assert SAVED in other_kernel and LOADED not in other_kernel, "code of one kernel must not serve another"
    folders = list((tmp_path / "cache/torch_compile_cache/torch_aot_compile").iterdir())
    assert len(folders) == 2 and all((folder / OURS).is_file() for folder in folders)


@pytest.mark.timeout(900)
def test_no_weight_is_part_of_the_code(tmp_path: Path, said: Say) -> None:
    """The key has the shards of a sparse model, not those of a dense one: other weights in the same place find it."""
    model = tmp_path / "model"
    models.save("llama", model, **SHAPE)
    before = said(model, "cpu")
    expected = transformers_oracle(model)[0]
    assert tokens(before) == expected and SAVED in before
    file = model / "model.safetensors"
    save_file({name: tensor.roll(1, -1) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    after = said(model, "cpu")
    assert LOADED in after and tokens(after) == transformers_oracle(model)[0] != expected

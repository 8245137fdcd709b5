"""A sparse model that vLLM compiles: the whole graph in one piece, kernels in it as opaque operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.offline import NEW_TOKENS, PROMPTS, make_sparse, transformers_oracle

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


@pytest.mark.timeout(900)
def test_a_compiled_model_says_what_transformers_says_and_is_compiled_once(tmp_path: Path) -> None:
    """In processes of their own: the other tests of this folder switch compilation off, since it takes its time."""
    sparse, masked = make_sparse("llama", tmp_path)
    (tmp_path / "compiled.py").write_text(PROGRAM)
    expected = transformers_oracle(masked)[0]

    def said(kernel: str) -> str:
        environment = os.environ | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
        del environment["TORCHDYNAMO_DISABLE"]
        command = [sys.executable, "compiled.py", str(sparse), kernel, str(NEW_TOKENS), json.dumps(PROMPTS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("tokens "))
        assert json.loads(line.removeprefix("tokens ")) == expected
        return done.stdout + done.stderr

    first, second, other_kernel = said("cpu"), said("cpu"), said("reference")
    assert SAVED in first and LOADED not in first
    assert LOADED in second and SAVED not in second
    assert SAVED in other_kernel and LOADED not in other_kernel, "code of one kernel must not serve another"

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
              kv_cache_memory_bytes=1 << 28)
    sampling = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[2]), ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[3])]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    print("tokens", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.timeout(600)
def test_a_compiled_model_says_what_transformers_says(tmp_path: Path) -> None:
    """In a process of its own: the other tests of this folder switch compilation off, since it takes its time."""
    sparse, masked = make_sparse("llama", tmp_path)
    script = tmp_path / "compiled.py"
    script.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, str(script), str(sparse), str(NEW_TOKENS), json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "AOT compiled function" in done.stdout + done.stderr, "it was not compiled"
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("tokens "))
    assert json.loads(line.removeprefix("tokens ")) == transformers_oracle(masked)[0]

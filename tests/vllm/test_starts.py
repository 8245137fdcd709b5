"""A start that fails ends with one line, which names the reason, wherever in vLLM that came up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.nursery import Nursery
from tests.vllm.serving import make_checkpoint

Refusal = Callable[..., str]


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return make_checkpoint(tmp_path)


@pytest.fixture
def refusal(vllm_nursery: Nursery) -> Refusal:
    """The one line that a failed start prints after it has said that it starts; without its ends."""

    def start(model: Path, *flags: str) -> str:
        done = vllm_nursery.command("serve", model, *flags, "--http-port=0", "--grpc-port=0")
        assert (done.returncode, done.stdout) == (2, "")
        _, line = done.stderr.splitlines()
        found = re.fullmatch(r"sparse-serve: error: (.*); log: (.*)", line)
        assert found and Path(found[2]).read_text(), line
        return found[1]

    return start


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--max-model-len=100000", r"User-specified max_model_len \(100000\) is greater than"),
        ("--quantization=fp8", r"Quantization method specified in the model config \(sparse_nm\) does not match .*fp8"),
        ("--tensor-parallel-size=3", r"attention heads \(4\) must be divisible by tensor parallel size \(3\)"),
        ("--gpu-memory-utilization=1.5", "gpu_memory_utilization is 1.5: Input should be less than or equal to 1"),
        ("--runner=pooling", "would run as a pooling model; this server serves models that generate text"),
        ("--lora-modules=a=/nowhere", "--lora-modules a=/nowhere: needs --enable-lora"),
        (
            "--chat-template=./none.jinja",
            r"chat template string \(\./none\.jinja\) appears path-like, but doesn't exist",
        ),
    ],
)
def test_what_is_wrong_with_flags(sparse: Path, refusal: Refusal, flag: str, reason: str) -> None:
    assert re.search(reason, refusal(sparse, flag))


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--num-gpu-blocks-override=1", "No available memory for the cache blocks"),
        ("--block-size=7", "No common block size for 7"),
        ("--load-format=nope", "Load format `nope` is not supported"),
    ],
)
def test_what_only_the_engines_process_knows(sparse: Path, refusal: Refusal, flag: str, reason: str) -> None:
    assert refusal(sparse, flag).startswith(f"the engine did not start: {reason}")


def test_what_only_the_http_api_knows(sparse: Path, refusal: Refusal) -> None:
    line = refusal(sparse, "--enable-auto-tool-choice", "--tool-call-parser=nope")
    assert line.startswith("the OpenAI API did not start: ") and "'nope'" in line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["FooForCausalLM"]}, r"Model architectures \['FooForCausalLM'\] are not supported"),
        ({"model_type": "foo"}, "has model type `foo` but Transformers does not recognize"),
        ({"num_attention_heads": 5}, r"hidden size \(128\) is not a multiple of the number of attention heads \(5\)"),
        ({"intermediate_size": 100}, r"start \(0\) \+ length \(100\) exceeds dimension size \(96\)"),
    ],
)
def test_what_is_wrong_with_a_dense_model(sparse: Path, refusal: Refusal, changes: dict[str, Any], reason: str) -> None:
    file = sparse.parent / "dense" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert re.search(reason, refusal(file.parent))

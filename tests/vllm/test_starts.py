"""A start that fails ends with one line, which names the reason, wherever in vLLM that came up."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgen.core.companions import SETTINGS_FILE
from tests import models
from tests.directories import edit_config
from tests.maskgen.export.test_convert import make_masked
from tests.vllm.nursery import Nursery
from tests.vllm.serving import SHAPE, make_checkpoint

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


def test_a_model_of_another_tool_that_vllm_lacks_is_refused_before_it_is_converted(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    masked = make_masked(tmp_path / "masked")
    edit_config(masked, lambda config: config.update(architectures=["NobodysForCausalLM"]))
    said = (
        r"vLLM \S+ cannot serve it \(NobodysForCausalLM\): Model architectures .* are not supported.*; give a model of"
    )
    assert re.search(said, refusal(masked))
    assert not [*tmp_path.glob("cache/sparse-serve/converted/*")]


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (
            "model.layers.1.input_layernorm.weight",
            None,
            r"weights were not initialized from checkpoint: \{'model.layers.1.input_layernorm.weight'\}",
        ),
        (
            "model.layers.1.mlp.down_proj.values",
            math.inf,
            "model.layers.1.mlp.down_proj: the values hold NaN or infinity; download",
        ),
    ],
)
def test_a_checkpoint_that_would_answer_wrongly_does_not_start(
    sparse: Path, refusal: Refusal, name: str, damage: float | None, reason: str
) -> None:
    """One tensor is missing, or one of its numbers is none."""
    spoil(sparse, name, damage)
    assert re.search(reason, refusal(sparse))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.1.self_attn.q_proj.bias", "no place for the tensor 'model.layers.1.self_attn.q_proj.bias'"),
        ("model.layers.1.extra.weight", "There is no module or parameter named 'layers.1.extra'"),
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_named(
    sparse: Path, refusal: Refusal, name: str, reason: str
) -> None:
    """A bias that vLLM's model does not have is one that vLLM itself would drop without a word."""
    add_tensor(sparse, name)
    assert reason in refusal(sparse)


def test_a_tensor_of_which_the_model_takes_a_part_is_named(sparse: Path, refusal: Refusal) -> None:
    """Fewer heads than are stored, and no record of the configuration: vLLM would take the first without a word."""
    (sparse / SETTINGS_FILE).unlink()

    def halve(config: dict[str, Any]) -> None:
        heads = config["num_attention_heads"]
        config.update(num_attention_heads=heads // 2, head_dim=config["hidden_size"] // heads)

    edit_config(sparse, halve)
    assert re.search(r"takes a part of the tensor 'model\.layers\.0\.self_attn\.\w+\.\w+' only", refusal(sparse))


def add_tensor(checkpoint: Path, *names: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors |= {name: torch.ones(128) for name in names}
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def test_a_norm_that_is_no_number_is_named(sparse: Path) -> None:
    """By the engine, once it runs."""
    spoil(sparse, "model.norm.weight", math.nan)
    line = last_line(sparse)
    assert re.search("error: 1 parameters of .*sparse hold NaN or infinity, such as model.norm.weight; download", line)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "model.layers.1.mlp.down_proj.values",
            "sparse/model.safetensors: model.layers.1.mlp.down_proj.values holds nothing but zeros; download or make",
        ),
        (
            "model.embed_tokens.weight",
            "sparse/model.safetensors: model.embed_tokens.weight holds nothing but zeros; download or make",
        ),
        (
            "model.layers.1.input_layernorm.weight",
            "1 norms of .*sparse hold nothing but zeros, such as model.layers.1.input_layernorm.weight; download or",
        ),
    ],
)
def test_zeros_in_place_of_weights_are_named(sparse: Path, name: str, reason: str) -> None:
    """What a download that broke off may leave behind; `values` have their bitmask."""
    make_zero(sparse, name)
    assert re.search(reason, last_line(sparse))


def test_a_dense_weight_of_zeros_is_named_unless_it_is_meant(sparse: Path) -> None:
    dense = sparse.parent / "dense"
    make_zero(dense, "lm_head.weight")
    assert "dense/model.safetensors: lm_head.weight holds nothing but zeros" in last_line(dense)
    # the flag lets it pass: the start gets as far as vLLM's own checks
    flags = ("--allow-zero-weights", "--num-gpu-blocks-override=1")
    assert "No available memory for the cache blocks" in last_line(dense, *flags)


def make_zero(model: Path, name: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def last_line(model: Path, *flags: str) -> str:
    """What a failed start says last, started as users do: a forked engine would pass the signal that ends it on to the
    server."""
    argv = ["-m", "sparse_serve.cli.main", "serve", model, *flags, "--http-port=0", "--grpc-port=0"]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    assert done.returncode == 2
    return done.stderr.splitlines()[-1]


def spoil(checkpoint: Path, name: str, number: float | None) -> None:
    """Take a tensor out of a checkpoint, or put a number in it."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensor = tensors.pop(name)
    if number is not None:
        tensor.view(-1)[0] = number
        tensors[name] = tensor
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def test_a_model_that_dies_in_its_first_step_does_not_start(sparse: Path) -> None:
    """vLLM's CPU attention has no heads of 16; it gets ready all the same."""
    models.save("llama", sparse.parent / "small", **{**SHAPE, "num_attention_heads": 8, "num_key_value_heads": 8})
    assert "the engine did not start: Unsupported CPU attention configuration: head_dim=16" in last_line(
        sparse.parent / "small"
    )


def test_digests_are_compared_if_asked(sparse: Path, vllm_nursery: Nursery) -> None:
    def refusal(model: Path) -> str:
        done = vllm_nursery.command("serve", model, "--verify-digests", "--http-port=0", "--grpc-port=0")
        assert done.returncode == 2
        return str(done.stderr.splitlines()[-1])

    spoil(sparse, "model.layers.1.mlp.down_proj.values", 0.125)
    assert re.search(r"sparse/model.safetensors: digest sha256:\w+, but", refusal(sparse))
    assert "is not a sparse checkpoint, and no other has digests" in refusal(sparse.parent / "dense")


def test_another_number_in_the_configuration_is_refused(sparse: Path, refusal: Refusal) -> None:
    """vLLM would serve it without a word."""
    edit_config(sparse, lambda config: config.update(rms_norm_eps=1e5))
    line = refusal(sparse)
    assert line.startswith(f"{sparse}/config.json: rms_norm_eps is 100000.0, and was 1e-0")
    assert "maskgen convert" in line


def test_a_changed_tokenizer_is_refused_if_asked(sparse: Path, refusal: Refusal) -> None:
    (sparse / "tokenizer_config.json").write_text("{}")
    assert "/tokenizer_config.json: changed since" in refusal(sparse, "--verify-digests")

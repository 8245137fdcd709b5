"""`sparse-serve serve` of checkpoints of other tools, as users run it: a copy is made once, and asked over HTTP."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import torch

from sparse_serve.runtime.conversion import Conversion, Prepared
from tests import foreign_files
from tests.directories import edit_config, edit_tensors
from tests.maskgen.export.test_convert import STORED, make_masked
from tests.vllm.nursery import Nursery
from tests.vllm.offline import NEW_TOKENS, PROMPTS, transformers_oracle
from tests.vllm.serving import end, launch, put_on_hub, wait_ready


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    return make_masked(tmp_path / "masked")


def test_the_server_takes_it_as_it_is(masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leftover section, a constant that older releases stored, and weights with zeros: converted once, and found
    again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    foreign_files.rewrite(masked, tmp_path / "old-model", *STORED["leftover"][:2])
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    edit_tensors(tmp_path / "old-model", lambda tensors: tensors.update(constant))
    tokens, _ = transformers_oracle(masked)
    server = launch(tmp_path / "old-model", tmp_path)
    try:
        wait_ready(server)
        assert "(4 sparse layers, float32" in server.output
        body = {"model": "old-model", "prompt": PROMPTS, "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = json.loads(server.get("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True}))
        assert [choice["token_ids"] for choice in answer["choices"]] == tokens
        assert "(masked-dense): converting it into" in (tmp_path / "err").read_text()
    finally:
        end(server)
    (copy,) = (path for path in (tmp_path / "cache/sparse-serve/converted").iterdir() if path.is_dir())
    told: list[str] = []
    made = Conversion(tell=told.append).prepare(tmp_path / "old-model", "old-model", lambda: None)
    assert made == Prepared(copy)
    assert "made of it before" in told[0]


def test_what_cannot_be_converted_is_said_in_one_line(
    masked: Path, tmp_path: Path, vllm_nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source"
    foreign_files.rewrite(masked, source, *STORED["marlin-w8"][:2])
    edit_config(source, lambda config: config["quantization_config"].update(kv_cache_scheme={"num_bits": 8}))
    done = vllm_nursery.command("serve", source, "--http-port=0", "--grpc-port=0")
    assert (done.returncode, done.stdout) == (2, "")
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"sparse-serve: error: {source} could not be converted: {source}/config.json: ")
    assert "kv_cache_scheme" in line and "--no-convert serves it as it is, if vLLM can; log: " in line


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--max-modle-len=9", "unrecognized arguments: --max-modle-len=9"),
        ("--max-model-len=100000", r"User-specified max_model_len \(100000\) is greater than"),
        ("--tensor-parallel-size=3", r"attention heads \(4\) must be divisible by tensor parallel size \(3\)"),
        ("--http-port={taken}", r"HTTP address 127.0.0.1:\d+: Address already in use"),
        ("--grpc-port={taken}", r"gRPC address 127.0.0.1:\d+"),
    ],
)
def test_a_wrong_flag_or_a_taken_port_is_refused_before_anything_is_converted(
    masked: Path, tmp_path: Path, vllm_nursery: Nursery, monkeypatch: pytest.MonkeyPatch, flag: str, reason: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    foreign_files.rewrite(masked, tmp_path / "source", *STORED["marlin-w8"][:2])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = {"--http-port": "0", "--grpc-port": "0"}
        name, _, value = flag.partition("=")
        flags[name] = value.format(taken=taken.getsockname()[1])
        words = [f"{name}={value}" for name, value in flags.items()]
        done = vllm_nursery.command("serve", tmp_path / "source", *words)
    assert done.returncode == 2
    assert re.search(reason, done.stderr.splitlines()[-1]), done.stderr
    assert not (tmp_path / "cache/sparse-serve/converted").exists()


def test_a_model_of_the_hub_is_converted_under_its_name(
    masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache stands for the hub: a start without a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokens, _ = transformers_oracle(masked)
    server = launch(put_on_hub(masked, tmp_path / "hub"), tmp_path, f"--download-dir={tmp_path / 'hub'}")
    try:
        wait_ready(server)
        assert "ready: tests/tiny (4 sparse layers, float32" in server.output
        body = {"model": "tests/tiny", "prompt": PROMPTS, "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = json.loads(server.get("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True}))
        assert [choice["token_ids"] for choice in answer["choices"]] == tokens
        assert "tiny is not a checkpoint of ours (masked-dense)" in (tmp_path / "err").read_text()
    finally:
        end(server)

"""Who takes part beside a sparse model: the conditions are alike, and who cannot be had says why."""

from __future__ import annotations

import importlib.util
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from maskgen.export.quantise import quantise
from sparse_serve.bench import gguf_model, peers
from sparse_serve.bench.peers import PEERS, Conditions, Contender
from sparse_serve.cli import field as cli
from sparse_serve.plugin import quantised
from sparse_serve.runtime.errors import BenchError, UnsupportedError
from tests import models

LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return models.save("llama", tmp_path / "dense", dtype=torch.bfloat16)


@pytest.fixture
def conditions(tmp_path: Path) -> Conditions:
    (tmp_path / "kept").mkdir()
    return Conditions(threads=3, slots=4, context=100, vllm_flags=["--enforce-eager"], folder=tmp_path / "kept")


def words(contender: Contender) -> str:
    return " ".join(contender.command)


def test_the_flag_names_every_peer() -> None:
    assert tuple(PEERS) == cli.PEERS


def test_every_server_has_the_same_conditions(
    dense: Path, conditions: Conditions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for has in ("has_int4", "has_w4a8"):
        monkeypatch.setattr(quantised, has, lambda: True)
    models.save_sparse(dense, tmp_path / "sparse")
    found = peers.ours([tmp_path / "sparse"], conditions)
    found += [peers.peer(name, dense, LAYERS, conditions) for name in PEERS]
    assert [contender.is_ours for contender in found] == [True, *[False] * len(PEERS)]
    names = [contender.name for contender in found]
    stock = ["vLLM bf16", "vLLM W8A8", "vLLM W4A16 g32", "vLLM W4A8 g32"]
    assert names == ["2:4 bf16", *stock, "llama.cpp Q8_0", "llama.cpp Q4_0"]
    for contender in found[:5]:
        per_token = peers.kv_bytes_per_token(json.loads((dense / "config.json").read_text()))
        room = f"--max-model-len=100 --kv-cache-memory-bytes={5 * 128 * per_token} --enforce-eager"
        assert room in words(contender), "a block for each request, and one more"
        assert "--no-enable-prefix-caching" in words(contender)
        assert contender.environ["OMP_NUM_THREADS"] == "3"
        assert "VLLM_CPU_KVCACHE_SPACE" not in contender.environ, "it would overrule the flag"
    for contender in found[1:5]:
        assert contender.environ["VLLM_PLUGINS"] == "", "stock vLLM"
        assert contender.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "as our server has it"
    assert [contender.environ.get("VLLM_CPU_INT4_W4A8") for contender in found[1:5]] == [None, None, "0", "1"]
    assert found[3].model == found[4].model, "the same weights"
    for contender in found[5:]:
        assert words(contender).endswith(f"{contender.model} 3 4 100")
    ports = {word for contender in found[1:5] for word in contender.command if word.startswith("--port=")}
    assert len(ports) == 4


def test_ours_are_named_after_their_values(dense: Path, conditions: Conditions, tmp_path: Path) -> None:
    models.save_sparse(dense, tmp_path / "a")
    models.save_sparse(dense, tmp_path / "b")
    quantise(tmp_path / "a", tmp_path / "c", "int8")
    found = peers.ours([tmp_path / "a", tmp_path / "b", tmp_path / "c"], conditions)
    assert [contender.name for contender in found] == ["2:4 bf16 (a)", "2:4 bf16 (b)", "2:4 int8"]
    (tmp_path / "x").mkdir()
    (tmp_path / "a").rename(tmp_path / "x/b")
    alike = peers.ours([tmp_path / "x/b", tmp_path / "b"], conditions)
    assert [contender.name for contender in alike] == ["2:4 bf16 (b), 1", "2:4 bf16 (b), 2"]
    (tmp_path / "x/b").rename(tmp_path / "a")
    rounded = peers.ours([tmp_path / "a", tmp_path / "c"], replace(conditions, int8_activations=True))
    assert [contender.name for contender in rounded] == ["2:4 bf16", "2:4 int8", "2:4 int8, int8 activations"]
    asked = ['"activations": "int8"' in words(contender) for contender in rounded]
    assert asked == [False, False, True], "only codes can be multiplied with them"
    head = peers.ours([tmp_path / "c"], replace(conditions, int8_activations=True, int8_head=True))
    assert [contender.name for contender in head] == ["2:4 int8", "2:4 int8, int8 activations and output layer"]
    assert ['"lm_head": "int8"' in words(contender) for contender in head] == [False, True]


@pytest.mark.parametrize("name", ["w8a8", "llama.cpp:q4_0"])
def test_what_is_kept_is_not_made_again(
    name: str, dense: Path, conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    first = peers.peer(name, dense, LAYERS, conditions).model
    before = first.stat().st_mtime_ns
    assert first.parent == conditions.folder
    assert peers.peer(name, dense, LAYERS, conditions).model == first and first.stat().st_mtime_ns == before
    if name == "w8a8":
        assert peers.peer(name, dense, LAYERS[:1], conditions).model != first, "other layers"


def test_why_a_peer_cannot_be_had(dense: Path, conditions: Conditions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "has_int4", lambda: False)
    with pytest.raises(UnsupportedError, match="with AVX-512 only, which this processor lacks"):
        peers.peer("w4a16", dense, LAYERS, conditions)
    monkeypatch.setattr(quantised, "has_int4", lambda: True)
    monkeypatch.setattr(quantised, "has_w4a8", lambda: False)
    with pytest.raises(UnsupportedError, match="with AMX only, which this processor lacks"):
        peers.peer("w4a8", dense, LAYERS, conditions)
    monkeypatch.setattr(quantised, "GROUPS", (128, 64))
    with pytest.raises(UnsupportedError, match=r"layers of \[64, 96\] inputs; vLLM's int4 wants groups of \(128, 64\)"):
        peers.peer("w4a16", dense, LAYERS, conditions)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedError, match=r"xllamacpp, which has llama\.cpp's server, is not installed; pip install"
    ):
        peers.peer("llama.cpp:q8_0", dense, LAYERS, conditions)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(UnsupportedError, match=r"^gguf is not installed"):
        peers.peer("llama.cpp:q8_0", dense, LAYERS, conditions)
    assert tuple(name.partition(":")[2] for name in PEERS if ":" in name) == gguf_model.KINDS


def test_room_for_keys_and_values_is_that_of_all_requests(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    assert peers.kv_bytes_per_token(config) == models.LAYERS * 2 * config["num_key_value_heads"] * width * 2
    wide = {"num_attention_heads": 8, "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 128}
    assert peers.kv_bytes_per_token(wide) == 2 * 2 * 8 * 128 * 2


def test_a_server_that_is_not_there_is_not_healthy_and_names_nothing() -> None:
    url = f"http://127.0.0.1:{peers._free_port()}"
    assert not peers.is_healthy(url)
    with pytest.raises(BenchError, match=r"/v1/models names no model: .*refused"):
        peers.served_name(url)


class LikeLlamaCpp(BaseHTTPRequestHandler):
    """Names its model without `root`, which vLLM's load generator would look for."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "ok"}' if self.path == "/health" else b'{"data": [{"id": "/a/model.gguf"}]}')

    def log_message(self, format: str, *words: object) -> None:
        pass


def test_a_server_is_asked_for_the_model_that_it_names() -> None:
    with HTTPServer(("127.0.0.1", 0), LikeLlamaCpp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert peers.is_healthy(url) and peers.served_name(url) == "/a/model.gguf"
        server.shutdown()

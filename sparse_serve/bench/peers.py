"""Who takes part when a sparse model is served beside what a user would pick instead.

Ours are sparse checkpoints, each under `sparse-serve serve`. A peer is the dense model in another program or form:

    bf16            stock vLLM, as it is
    w8a8            stock vLLM, int8 weights and activations (`bench.quantised_model`)
    w4a16           stock vLLM, int4 weights in the longest groups that are whole in every layer
    w4a8            the same, int8 activations: what vLLM does by itself with AMX
    llama.cpp:q8_0  llama.cpp, 8 bits (`bench.gguf_model`)
    llama.cpp:q4_0  llama.cpp, 4 bits

Integer weights replace those of the layers that are sparse in ours. Stock vLLM runs without this package's plugin, and
with the settings that `sparse-serve serve` gives vLLM on a CPU: by itself it would compute on all cores but one there.
All have the same threads, room for the same requests, and read a prompt again that they have seen before.

A peer that cannot be had here raises `UnsupportedError`, whose text is the reason.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import socket
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from maskgen.core.checkpoint import SparseCheckpoint, read_headers
from maskgen.core.digest import digest_json, digest_weights
from maskgen.core.files import read_json
from maskgen.core.values import FLOAT, INT4, INT8
from sparse_serve.bench import gguf_model, quantised_model
from sparse_serve.bench.quantised_model import Scheme
from sparse_serve.engine.vllm_defaults import set_cpu
from sparse_serve.plugin import quantised
from sparse_serve.runtime import machine
from sparse_serve.runtime.errors import BenchError, UnsupportedError
from sparse_serve.runtime.load import serve_command

_BLOCK_TOKENS = 128
"""Tokens of a block of vLLM's KV cache on a CPU; requests have whole ones."""

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""For servers of this machine, whatever proxy the environment names."""

_ROUNDED = {"activations": "int8"}

_KV_BYTES = 2
"""Of a number in the KV cache, which is bfloat16 or float16."""


@dataclass(frozen=True)
class Conditions:
    """What all servers have in common: `threads` to compute with, `slots` requests at a time of up to `context` tokens,
    `vllm_flags` for those with vLLM, and `folder`, where peers' models are kept. With `int8_activations` ours with
    values of 8 or 4 bits are there a second time, with activations rounded; with `int8_head` the output layer is in
    int8 then, too."""

    threads: int
    slots: int
    context: int
    vllm_flags: Sequence[str]
    folder: Path
    int8_activations: bool = False
    int8_head: bool = False


@dataclass(frozen=True)
class Contender:
    """A server to start: what runs, on which model, in which environment.

    `address` finds out whether it is up (`load.started`); None: it prints its address as ours does.
    """

    name: str
    is_ours: bool
    model: Path
    command: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    address: Callable[[str], str | None] | None = None


def ours(sparse: Sequence[Path], conditions: Conditions) -> list[Contender]:
    """Our server on each checkpoint, named after pattern and values; names that are alike have the directory's too."""
    configs = [SparseCheckpoint.open(path, verify_bits=False).config for path in sparse]
    names = [f"{config.pattern} {'bf16' if config.values == FLOAT else config.values}" for config in configs]
    named = [
        name if names.count(name) == 1 else f"{name} ({path.resolve().name})"
        for name, path in zip(names, sparse, strict=True)
    ]
    found = []
    for number, (path, config, name) in enumerate(zip(sparse, configs, named, strict=True), 1):
        name = name if named.count(name) == 1 else f"{name}, {number}"
        flags = _vllm_flags(path, conditions)
        found.append(Contender(name, True, path, serve_command(path, flags), _threads(conditions)))
        if conditions.int8_activations and config.values in (INT8, INT4):
            rounded = _ROUNDED | ({"lm_head": "int8"} if conditions.int8_head else {})
            name = f"{name}, int8 activations" + (" and output layer" if conditions.int8_head else "")
            command = serve_command(path, [*flags, f"--additional-config={json.dumps({'sparse_nm': rounded})}"])
            found.append(Contender(name, True, path, command, _threads(conditions)))
    return found


def peer(name: str, dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    """One of `PEERS` on the dense model, made first if need be; `layers` are those that get integer weights.

    Raises `UnsupportedError` with the reason why it cannot be had.
    """
    return PEERS[name](dense, layers, conditions)


def _dense(dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    return _stock("vLLM bf16", dense, conditions)


def _w8a8(dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    return _stock("vLLM W8A8", _quantised(dense, layers, Scheme(8), conditions), conditions)


def _w4a16(dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    return _int4("W4A16", dense, layers, conditions)


def _w4a8(dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    if not quantised.has_w4a8():
        raise UnsupportedError("vLLM rounds activations with int4 weights with AMX only, which this processor lacks")
    return _int4("W4A8", dense, layers, conditions)


def _int4(name: str, dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    if not quantised.has_int4():
        raise UnsupportedError(quantised.NO_INT4)
    headers = read_headers(dense)
    inputs = {headers[f"{layer}.weight"].shape[1] for layer in layers}
    group = quantised.common_group(inputs)
    if group is None:
        raise UnsupportedError(f"layers of {sorted(inputs)} inputs; vLLM's int4 wants groups of {quantised.GROUPS}")
    contender = _stock(f"vLLM {name} g{group}", _quantised(dense, layers, Scheme(4, group), conditions), conditions)
    environ = {**contender.environ, "VLLM_CPU_INT4_W4A8": str(int(name == "W4A8"))}
    return replace(contender, environ=environ)


def _llama_cpp(kind: str, dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    if importlib.util.find_spec("xllamacpp") is None:
        raise UnsupportedError(
            "xllamacpp, which has llama.cpp's server, is not installed; pip install 'sparse-serve[llama-cpp]'"
        )
    gguf_model.check_installed()
    key = digest_json([digest_weights(dense), kind])[7:15]
    file = conditions.folder / f"{dense.resolve().name}-{kind}-{key}.gguf"
    if not file.exists():
        gguf_model.write(dense, file, kind)
    numbers = (conditions.threads, conditions.slots, conditions.context)
    command = [sys.executable, "-m", "sparse_serve.cli.llama_cpp", str(file), *map(str, numbers)]
    return Contender(f"llama.cpp {kind.upper()}", False, file, command)


def _q8_0(dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    return _llama_cpp("q8_0", dense, layers, conditions)


def _q4_0(dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
    return _llama_cpp("q4_0", dense, layers, conditions)


PEERS: dict[str, Callable[[Path, Sequence[str], Conditions], Contender]] = {
    "bf16": _dense,
    "w8a8": _w8a8,
    "w4a16": _w4a16,
    "w4a8": _w4a8,
    "llama.cpp:q8_0": _q8_0,
    "llama.cpp:q4_0": _q4_0,
}
"""What makes them, by the name that a user gives."""


def _quantised(dense: Path, layers: Sequence[str], scheme: Scheme, conditions: Conditions) -> Path:
    """The directory of the model with these codes, made unless it is there."""
    key = digest_json([digest_weights(dense), sorted(layers), vars(scheme)])[7:15]
    out = conditions.folder / f"{dense.resolve().name}-int{scheme.bits}-{key}"
    if not out.exists():
        quantised_model.write(dense, out, scheme, layers)
    return out


def _stock(name: str, model: Path, conditions: Conditions) -> Contender:
    url = f"http://127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "sparse_serve.cli.vllm", "serve", str(model), "--host=127.0.0.1"]
    command += [f"--port={url.rpartition(':')[2]}", *_vllm_flags(model, conditions)]
    environ = _threads(conditions) | {"VLLM_PLUGINS": "", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    if not torch.cuda.is_available():
        set_cpu(environ, 1, False, machine.usable_cores(), _kv_bytes(model, conditions))
    return Contender(name, False, model, command, environ, lambda said: url if is_healthy(url) else None)


def _threads(conditions: Conditions) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(conditions.threads)}


def _vllm_flags(model: Path, conditions: Conditions) -> list[str]:
    room = [f"--max-model-len={conditions.context}", f"--kv-cache-memory-bytes={_kv_bytes(model, conditions)}"]
    return ["--dtype=bfloat16", "--no-enable-prefix-caching", *room, *conditions.vllm_flags]


def _kv_bytes(model: Path, conditions: Conditions) -> int:
    blocks = (conditions.slots + 1) * -(-conditions.context // _BLOCK_TOKENS)
    return blocks * _BLOCK_TOKENS * kv_bytes_per_token(read_json(model / "config.json"))


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """What a token's keys and values take in all layers of a model with this `config.json`."""
    config = config.get("text_config") or config
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width * _KV_BYTES)


def is_healthy(url: str) -> bool:
    """Whether a server answers there that it is ready."""
    try:
        with _NO_PROXY.open(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def served_name(url: str) -> str:
    """The first model that a server names, to ask it for. Raises `BenchError` for an answer that has none."""
    try:
        with _NO_PROXY.open(f"{url}/v1/models", timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{url}/v1/models names no model: {error!r}") from None


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])

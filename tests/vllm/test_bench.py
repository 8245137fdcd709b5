"""`sparse-serve bench kernels` from flags to tables, JSON and a picture, on a small layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparse_serve.plugin import quantised
from sparse_serve.runtime.errors import KernelError
from tests.vllm.nursery import command

READ = "read of cpu's bytes"
NEEDS_AMX = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="a processor without AMX")
NEEDS_INT4 = pytest.mark.skipif(not quantised.has_int4(), reason=quantised.NO_INT4)


def test_every_candidate_is_measured(tmp_path: Path) -> None:
    """Not a smaller layer: there are as many copies of it as fill more than the processor's caches."""
    flags = ["--shapes", "512x1024", "--tokens", "1,3", "--with-reference", "--seconds", "0", "--threads", "1"]
    ran = command(
        "bench", "kernels", *flags, "--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.svg")
    )
    assert ran.returncode == 0, ran.stderr
    assert "512 x 1024" in ran.stdout and "of byte" in ran.stdout
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {"created", "commit", "versions", "processor", "threads", "isa", "dtype"} <= set(written)
    one, three = written["results"]
    shapes = [(row["out_features"], row["in_features"], row["tokens"]) for row in (one, three)]
    assert shapes == [(512, 1024, 1), (512, 1024, 3)]
    known = {
        f"{kernel}{values}"
        for kernel in ("cpu", "cpu_int8", "reference")
        for values in ("", " int8", " int4", " fp8_e4m3")
    }
    kernels = known & set(one["speedup"])
    assert {"cpu", "cpu int8", "cpu int4", "reference"} <= kernels == set(one["speedup"])
    dense = {"dense torch", "dense vllm", "vllm W8A8"}
    dense |= {f"vllm {quantised.int4_name()}"} if quantised.has_int4() else set()
    assert set(one["median_s"]) == kernels | dense | {READ} == set(one["weight_bytes"])
    assert set(three["median_s"]) == kernels | dense == set(one["of_byte_limit"])
    assert three["of_byte_limit"] == {}
    for row in (one, three):
        assert {name: set(ratios) for name, ratios in row["speedup_over"].items()} == dict.fromkeys(dense, kernels)
        assert all(value > 0 for value in (*row["median_s"].values(), *row["speedup"].values()))
    assert one["weight_bytes"]["dense torch"] == 512 * 1024 * 2
    assert ">cpu int8</text>" in (tmp_path / "bench.svg").read_text()


@pytest.fixture(params=[pytest.param("0", marks=NEEDS_INT4), pytest.param("1", marks=NEEDS_AMX)], ids=["W4A16", "W4A8"])
def int4_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """That of vLLM's int4 layers, of both kinds where the processor has both."""
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", request.param)
    return f"vllm {quantised.int4_name()}"


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("in_features", "group"), [(256, 128), (192, 64), (224, 32)])
def test_quantised_peers_compute_the_layer(tokens: int, in_features: int, group: int, int4_name: str) -> None:
    weight_OI = torch.randn(64, in_features).to(torch.bfloat16)
    x_TI = torch.randn(tokens, in_features).to(torch.bfloat16)
    exact_TO = x_TI.float() @ weight_OI.float().T
    errors = {}
    for name in ("vllm W8A8", int4_name):
        y_TO = quantised.peers()[name](weight_OI).copy()(x_TI)
        assert y_TO.dtype is torch.bfloat16
        errors[name] = ((y_TO.float() - exact_TO).norm() / exact_TO.norm()).item()
    assert errors["vllm W8A8"] < 0.02 < errors[int4_name] < 0.2
    nbytes = quantised.peers()[int4_name](weight_OI).nbytes
    assert nbytes == 64 * in_features // 2 + 2 * 64 * in_features // group, "the longest whole group"


def test_a_layer_that_is_not_in_whole_groups_has_no_such_peer(int4_name: str) -> None:
    kind = int4_name.split()[1]
    with pytest.raises(KernelError, match=rf"{kind} has no layer of \[64, 80\] in torch.bfloat16: .*multiples of 32"):
        quantised.peers()[int4_name](torch.zeros(64, 80, dtype=torch.bfloat16))


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("amx", [False, True])
def test_vllm_has_one_kind_of_int4_layers_at_a_time(amx: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", str(int(wanted)))
    assert list(quantised.peers()) == ["vllm W8A8", "vllm W4A8" if amx and wanted else "vllm W4A16"]


def test_a_processor_without_int4_layers_has_no_such_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "has_int4", lambda: False)
    with pytest.raises(KernelError, match=r"W4A\d+: vLLM has layers of int4 weights with AVX-512 only"):
        quantised.int4_layer(torch.zeros(64, 256, dtype=torch.bfloat16))


@NEEDS_AMX
def test_what_vllm_fails_at_with_amx_is_no_peer() -> None:
    with pytest.raises(KernelError, match=r"W8A8 has no layer of \[64, 256\] in torch.float32 with AMX"):
        quantised.w8a8(torch.zeros(64, 256))


def test_that_there_is_nothing_to_plot_to_is_said_at_once() -> None:
    ran = command("bench", "kernels", "--plot", "roofline.jpg")
    assert ran.returncode == 2
    assert "--plot roofline.jpg: expected a name that ends in one of .svg, .png, .pdf" in ran.stderr

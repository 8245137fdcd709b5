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
    dense |= set() if torch.cpu._is_amx_tile_supported() else {"vllm W4A16"}
    assert set(one["median_s"]) == kernels | dense | {READ} == set(one["weight_bytes"])
    assert set(three["median_s"]) == kernels | dense == set(one["of_byte_limit"])
    assert three["of_byte_limit"] == {}
    for row in (one, three):
        assert {name: set(ratios) for name, ratios in row["speedup_over"].items()} == dict.fromkeys(dense, kernels)
        assert all(value > 0 for value in (*row["median_s"].values(), *row["speedup"].values()))
    assert one["weight_bytes"]["dense torch"] == 512 * 1024 * 2
    assert ">cpu int8</text>" in (tmp_path / "bench.svg").read_text()


@pytest.mark.parametrize("tokens", [1, 5])
def test_quantised_peers_compute_the_layer(tokens: int) -> None:
    weight_OI, x_TI = torch.randn(64, 256).to(torch.bfloat16), torch.randn(tokens, 256).to(torch.bfloat16)
    exact_TO = x_TI.float() @ weight_OI.float().T
    errors = {}
    for name, make in quantised.PEERS.items():
        y_TO = make(weight_OI).copy()(x_TI)
        assert y_TO.dtype is torch.bfloat16
        errors[name] = ((y_TO.float() - exact_TO).norm() / exact_TO.norm()).item()
    assert errors["vllm W8A8"] < 0.02 < errors["vllm W4A16"] < 0.2
    assert quantised.w4a16(weight_OI).nbytes == 64 * 256 // 2 + 2 * 64 * 256 // 128
    assert quantised.w4a16(weight_OI[:, :192]).nbytes == 64 * 192 // 2 + 2 * 64 * 192 // 64, "the longest whole group"


def test_a_layer_that_is_not_in_whole_groups_has_no_such_peer() -> None:
    with pytest.raises(KernelError, match=r"W4A16 has no layer of \[64, 80\] in torch.bfloat16: .*multiples of 32"):
        quantised.w4a16(torch.zeros(64, 80, dtype=torch.bfloat16))


def test_with_amx_vllm_would_round_activations_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.raises(KernelError, match="VLLM_CPU_INT4_W4A8=0"):
        quantised.w4a16(torch.zeros(64, 256, dtype=torch.bfloat16))


def test_that_there_is_nothing_to_plot_to_is_said_at_once() -> None:
    ran = command("bench", "kernels", "--plot", "roofline.jpg")
    assert ran.returncode == 2
    assert "--plot roofline.jpg: expected a name that ends in one of .svg, .png, .pdf" in ran.stderr

"""The frontier: what peers are made of and take, and that every point is measured once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from maskgen.cli import parser
from maskgen.core.checkpoint import read_headers
from maskgen.core.digest import digest_weights
from maskgen.numerics.statistics import Gram
from sparse_serve.bench import quantised_model
from sparse_serve.bench.field import FieldRequest
from sparse_serve.bench.field_result import Entry, Result, Turn
from sparse_serve.gate.evidence import HostReading
from sparse_serve.plugin import quantised
from sparse_serve.runtime.load import Load
from tests import models
from tests.bench import frontier, frontier_chart, peers, quality, record

ModelDir = Callable[..., Path]
DENSE, MASKED, CODES = frontier.DENSE, "magnitude", f"magnitude, {frontier.INT8}"


def correlated(rows: int, columns: int) -> tuple[Tensor, Tensor, Gram]:
    """A weight, and inputs whose columns resemble each other, with their statistics."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=generator)
    x_TI = torch.randn(512, columns // 4, generator=generator) @ torch.randn(columns // 4, columns, generator=generator)
    x_TI += 0.1 * torch.randn(512, columns, generator=generator)
    return weight_OI, x_TI, Gram(x_TI.T @ x_TI, len(x_TI))


def test_bytes_are_those_of_codes_and_scales() -> None:
    assert peers.Scheme(8).stored_bytes(4, 32) == 4 * (32 + 2)
    assert peers.Scheme(4, 64).stored_bytes(4, 128) == 4 * (64 + 2 * 2)
    assert peers.Scheme(4, 128).stored_bytes(4, 576) == 4 * (288 + 5 * 2), "the last group is a half"


@pytest.mark.parametrize("scheme", [peers.Scheme(8), peers.Scheme(4, 16), peers.Scheme(4, 32)])
def test_rounded_values_are_codes_times_the_scale_of_their_group(scheme: peers.Scheme) -> None:
    weight_OI = correlated(8, 40)[0]
    weight_OI[3, :16] = 0
    scale_OI = peers.scales(weight_OI, scheme)
    assert torch.equal(scale_OI, scale_OI.bfloat16().float())
    for part in scale_OI.split(scheme.group or 40, dim=1):
        assert torch.equal(part, part[:, :1].expand_as(part))
    value_OI = peers.rounded(weight_OI, scale_OI, scheme.bits)
    codes_OI = value_OI / scale_OI
    assert torch.equal(codes_OI, codes_OI.round()) and codes_OI.abs().max() == 2 ** (scheme.bits - 1) - 1
    assert ((value_OI - weight_OI).abs() <= 0.501 * scale_OI).all()
    assert scheme.group is None or (value_OI[3, :16] == 0).all()


def test_gptq_makes_up_for_what_rounding_does() -> None:
    weight_OI, x_TI, stats = correlated(16, 160)
    scheme = peers.Scheme(4, 32, gptq=True)
    scale_OI, before = peers.scales(weight_OI, scheme), weight_OI.clone()
    found_OI = peers.gptq(weight_OI, stats, scheme)
    assert torch.equal(weight_OI, before), "arguments stay as they are"
    assert torch.allclose(found_OI / scale_OI, (found_OI / scale_OI).round(), atol=1e-4)
    nearest_OI = peers.rounded(weight_OI, scale_OI, 4)
    errors = [float((x_TI @ (value_OI - weight_OI).T).square().sum()) for value_OI in (found_OI, nearest_OI)]
    assert errors[0] < 0.5 * errors[1]


def test_gptq_is_rounding_where_inputs_have_nothing_in_common() -> None:
    weight_OI = correlated(16, 160)[0]
    scheme = peers.Scheme(4, 32, gptq=True)
    stats = Gram(torch.diag(torch.arange(160.0)), 10)  # the first input is always 0
    expected_OI = peers.rounded(weight_OI, peers.scales(weight_OI, scheme), 4)
    expected_OI[:, 0] = 0
    assert torch.allclose(peers.gptq(weight_OI, stats, scheme), expected_OI, atol=1e-6)


@pytest.mark.parametrize("name", ["int8 per row", "int4 g64, rounded"])
def test_what_is_served_has_the_codes_that_are_scored(name: str, model_dir: ModelDir, tmp_path: Path) -> None:
    dense, scheme = model_dir("llama", dtype=torch.bfloat16, intermediate_size=128), peers.PEERS[name]
    peers.write(dense, tmp_path / "scored", scheme, peers.Calibration([]))
    layers = {name for targets in peers.linears(dense).targets for name in targets}
    quantised_model.write(dense, tmp_path / "served", scheme, layers)
    scored = load_file(tmp_path / "scored" / "model.safetensors")
    served = load_file(tmp_path / "served" / "model.safetensors")
    weights = {name.removesuffix("_scale") for name in served if name.endswith(".weight_scale")}
    assert weights == {f"{name}.weight" for name in layers} and len(weights) == 7 * models.LAYERS
    assert {key for key in scored if key in served} >= scored.keys() - weights
    for layer in weights:
        if scheme.bits == 8:
            codes_OI = served[layer]
        else:
            words_OW1 = served[f"{layer}_packed"].to(torch.int64).unsqueeze(2)
            codes_OI = ((words_OW1 >> torch.arange(0, 32, 4)) & 15).flatten(1) - 8
            assert served[f"{layer}_shape"].tolist() == list(codes_OI.shape)
        scale_OG = served[f"{layer}_scale"].float()
        values_OI = codes_OI * scale_OG.repeat_interleave(codes_OI.shape[1] // scale_OG.shape[1], dim=1)
        assert torch.equal(values_OI.bfloat16(), scored[layer])


@pytest.mark.parametrize(
    ("has_int4", "has_w4a8", "names", "expected"),
    [
        (True, False, list(peers.PEERS), ["w8a8", "w4a16"]),
        (True, True, ["int4 g64, GPTQ"], ["w4a8"]),
        (True, True, ["int4 g128, rounded", "int8 per row"], ["w8a8"]),
        (False, False, list(peers.PEERS), ["w8a8"]),
    ],
)
def test_which_peers_vllm_serves(
    has_int4: bool,
    has_w4a8: bool,
    names: list[str],
    expected: list[str],
    model_dir: ModelDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantised, "has_int4", lambda: has_int4)
    monkeypatch.setattr(quantised, "has_w4a8", lambda: has_w4a8)
    dense = model_dir("llama", intermediate_size=128)  # groups of 128 are not whole in its layers of 64 inputs
    assert peers.servers(dense, names) == expected


def test_which_points_a_server_stands_for() -> None:
    names = list(peers.PEERS)
    assert peers.points_of("vLLM W8A8", names) == ["int8 per row"]
    assert peers.points_of("vLLM W4A16 g64", names) == ["int4 g64, rounded", "int4 g64, GPTQ"]
    assert peers.points_of("vLLM W4A8 g128", ["int4 g64, GPTQ"]) == []
    assert peers.points_of("vLLM bf16", names) == []


SERVERS = {"2:4 bf16": 10.0, "2:4 int8": 8.0, "2:4 int8, int8 activations": 4.0, "vLLM bf16": 20.0, "vLLM W8A8": 5.0}
"""Milliseconds per token, made up."""


@dataclass
class Calls:
    """Verbs of `maskgen` that were run, and what was asked to be served."""

    verbs: list[str] = field(default_factory=list)
    served: list[FieldRequest] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """What cannot be served, and why."""

    def maskgen(self, arguments: list[str]) -> dict[str, float]:
        self.verbs.append(arguments[0])
        assert parser.main(arguments) == 0
        return {}

    def serve(self, request: FieldRequest, tell: Callable[[str], None]) -> Result:
        tell("round 1")
        self.served.append(request)
        floats, codes = map(digest_weights, request.sparse)
        ours = {"2:4 bf16": floats, "2:4 int8": codes, "2:4 int8, int8 activations": codes}
        entries = [Entry(name, name in ours, 1.0, None, 1, ours.get(name, ""), "eager") for name in SERVERS]
        turns = [
            Turn(name, number, Load(clients, 1, 8, 9), 1.0, tpot_ms * (1 + number) * (2 if clients > 1 else 1), 0.0)
            for name, tpot_ms in SERVERS.items()
            for number in range(2)
            for clients in request.clients
            if name not in self.refused
        ]
        return Result(entries, self.refused, turns, [HostReading(0.0, 0.0, (1.0,))] * 2)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the frontier does in other processes is done here, or is made up; results go to `tmp_path / "results"`."""
    made = Calls()
    monkeypatch.setattr(quality, "maskgen", made.maskgen)
    monkeypatch.setattr(frontier.field, "run", made.serve)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return made


def test_every_point_is_measured_once(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sparse = model_dir("llama", dtype=torch.bfloat16, intermediate_size=128), tmp_path / "sparse"
    models.save_sparse(dense, sparse)
    command = ["--model", dense, "--label", "tiny", "--data", text_file, "--calibrate", text_file, "--samples", 4]
    command += ["--calibration-window", 32, "--window", 32, "--windows", 4, "--work", tmp_path / "work", "--clients", 1]
    words = [*map(str, command), "--plot", str(tmp_path / "plot.svg"), "--speed", "--points", f"{MASKED}={sparse}"]
    assert frontier.main(words) == 0
    files = sorted((tmp_path / "results").iterdir())
    assert calls.verbs.count("quantise") == 1 and calls.verbs.count("eval") == 3 + len(peers.PEERS)
    assert len(files) == calls.verbs.count("eval") + 1
    assert (tmp_path / "plot.svg").read_text("utf-8").startswith("<?xml")
    printed = capsys.readouterr().out
    (asked,) = calls.served
    assert asked.sparse[0] == sparse and len(asked.sparse) == 2 and asked.peers[:2] == ("bf16", "w8a8")
    assert asked.int8_activations and asked.clients == (1,)
    speeds = {line.split(" | ")[0].strip("| *"): line.split(" | ")[-2:] for line in printed.splitlines()}
    assert speeds["point"] == ["decode, 1 client", "decode, 1 client, int8 activations |"]
    assert speeds[DENSE] == ["1.00x", " |"] and speeds["int8 per row"] == ["4.00x", " |"]
    assert speeds[MASKED] == ["2.00x", " |"] and speeds[CODES] == ["2.50x", "5.00x |"]
    assert speeds["int4 g64, rounded"] == ["", " |"], "nobody served it"

    calls.verbs.clear()
    assert frontier.main(words) == 0
    assert calls.verbs == [] and len(calls.served) == 1 and sorted((tmp_path / "results").iterdir()) == files
    assert capsys.readouterr().out.splitlines()[-9:] == printed.splitlines()[-9:]

    results = {
        result["point"]: result for result in map(json.loads, (file.read_text() for file in files)) if "kl" in result
    }
    found = {point.name: point for point in frontier_chart.points(results)}
    assert (found[DENSE].linear, found[DENSE].ratio, found[DENSE].kl) == (1.0, 1.0, 0.0)
    assert found[MASKED].linear == 0.5625 and found[CODES].linear > 0.3125
    assert found["int8 per row"].kl < found["int4 g64, rounded"].kl
    assert found["int4 g64, GPTQ"].kl < found["int4 g64, rounded"].kl
    share = results[DENSE]["linear_bytes"] / results[DENSE]["total_bytes"]
    assert all(point.total == pytest.approx(point.linear * share + 1 - share) for point in found.values())
    assert [point.family for point in found.values()].count("sparse") == 2

    shapes = {name: header.shape for name, header in read_headers(dense).items()}
    written = [path for path in (tmp_path / "work").glob("peer-*") if path.is_dir()]
    assert len(written) == len(peers.PEERS)
    for peer in written:
        assert {name: header.shape for name, header in read_headers(peer).items()} == shapes
        assert (peer / "tokenizer.json").exists()


def test_a_point_that_is_none(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", model_dir(), "--label", "tiny", "--data", text_file, "--work", tmp_path / "work"]
    for point in (f"x={model_dir()}", "x", f"={model_dir()}"):
        assert frontier.main([*map(str, words), "--peers", "int8 per row", "--points", point]) == 2
        assert capsys.readouterr().err == f"error: --points {point}: expected NAME=DIR of a sparse checkpoint\n"
    with pytest.raises(SystemExit) as stopped:
        frontier.main([*map(str, words), "--peers", "int4 g64, GPTQ"])
    assert stopped.value.code == 2 and "give it with --calibrate" in capsys.readouterr().err


def test_a_point_to_be_served_that_is_none(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sparse = model_dir("llama", dtype=torch.bfloat16, intermediate_size=128), tmp_path / "sparse"
    models.save_sparse(dense, sparse)
    words = ["--model", dense, "--label", "tiny", "--data", text_file, "--work", tmp_path / "work", "--no-int8"]
    words += ["--peers", "--points", f"a={sparse}", "--speed", "b"]
    assert frontier.main(list(map(str, words))) == 2
    assert capsys.readouterr().err == "error: --speed 'b': no such point; there are 'a'\n"
    assert not calls.verbs and not calls.served


def test_speed_cannot_be_told_without_the_dense_server(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sparse = model_dir("llama", dtype=torch.bfloat16, intermediate_size=128), tmp_path / "sparse"
    models.save_sparse(dense, sparse)
    calls.refused["vLLM bf16"] = "no room"
    words = ["--model", dense, "--label", "tiny", "--data", text_file, "--work", tmp_path / "work", "--windows", 2]
    words += ["--window", 32, "--peers", "--points", f"a={sparse}", "--speed"]
    assert frontier.main(list(map(str, words))) == 1
    error = "error: --speed: every speed is told by the dense model's, which could not be served: no room\n"
    printed = capsys.readouterr()
    assert printed.err.endswith(error) and "| a |" in printed.out
    assert calls.served and not any("served" in result for result in record.load(frontier.WHAT, "tiny"))


def test_what_no_other_point_beats() -> None:
    def point(linear: float, kl: float) -> frontier_chart.Point:
        return frontier_chart.Point("a", "sparse", linear, linear, 1.0, kl, 1.0)

    among = [point(1.0, 0.0), point(0.5, 0.1), point(0.6, 0.2), point(0.5, 0.3), point(0.3, 0.3)]
    assert [frontier_chart.is_best(one, among) for one in among] == [True, True, False, False, True]

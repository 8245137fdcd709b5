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
from maskgen.core.files import read_json
from maskgen.numerics.statistics import Gram
from sparse_serve.bench import serve
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
    assert peers.is_served(dense, scheme) and not peers.is_served(dense, peers.Scheme(4, 128))
    peers.write(dense, tmp_path / "scored", scheme, peers.Calibration([]))
    peers.write_served(dense, tmp_path / "served", scheme)
    scored = load_file(tmp_path / "scored" / "model.safetensors")
    served = load_file(tmp_path / "served" / "model.safetensors")
    layers = {name.removesuffix("_scale") for name in served if name.endswith(".weight_scale")}
    assert len(layers) == 7 * models.LAYERS and {key for key in scored if key in served} >= scored.keys() - layers
    for layer in layers:
        if scheme.bits == 8:
            codes_OI = served[layer]
        else:
            words_OW1 = served[f"{layer}_packed"].to(torch.int64).unsqueeze(2)
            codes_OI = ((words_OW1 >> torch.arange(0, 32, 4)) & 15).flatten(1) - 8
            assert served[f"{layer}_shape"].tolist() == list(codes_OI.shape)
        scale_OG = served[f"{layer}_scale"].float()
        values_OI = codes_OI * scale_OG.repeat_interleave(codes_OI.shape[1] // scale_OG.shape[1], dim=1)
        assert torch.equal(values_OI.bfloat16(), scored[layer])


@dataclass
class Calls:
    """Verbs of `maskgen` that were run, and the kinds of models that were served beside the dense one."""

    verbs: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)

    def maskgen(self, arguments: list[str]) -> dict[str, float]:
        self.verbs.append(arguments[0])
        assert parser.main(arguments) == 0
        return {}

    def serve(self, request: serve.ServeRequest, tell: Callable[[str], None]) -> list[serve.Run]:
        tell("round 1")
        self.served.append(read_json(request.sparse / "config.json")["quantization_config"]["quant_method"])
        speeds = {"dense": 10.0, "sparse": 15.0}
        names = [metric.name for metric in serve.METRICS]
        return [serve.Run(name, 0, 1, dict.fromkeys(names, speed), {}) for name, speed in speeds.items()]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the frontier does in other processes is done here, or is made up; results go to `tmp_path / "results"`."""
    made = Calls()
    monkeypatch.setattr(quality, "maskgen", made.maskgen)
    monkeypatch.setattr(serve, "run", made.serve)
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
    assert len(files) == calls.verbs.count("eval") + len(calls.served)
    assert (tmp_path / "plot.svg").read_text("utf-8").startswith("<?xml")
    printed = capsys.readouterr().out
    assert calls.served == ["sparse_nm"] * 2 + ["compressed-tensors"] * 2, "int4 in groups that are whole"
    assert printed.count("1.50x") == 5, "the two roundings to the same codes share a time"

    calls.verbs.clear()
    assert frontier.main(words) == 0
    assert calls.verbs == [] and len(calls.served) == 4 and sorted((tmp_path / "results").iterdir()) == files
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


def test_what_no_other_point_beats() -> None:
    def point(linear: float, kl: float) -> frontier_chart.Point:
        return frontier_chart.Point("a", "sparse", linear, linear, 1.0, kl, 1.0)

    among = [point(1.0, 0.0), point(0.5, 0.1), point(0.6, 0.2), point(0.5, 0.3), point(0.3, 0.3)]
    assert [frontier_chart.is_best(one, among) for one in among] == [True, True, False, False, True]

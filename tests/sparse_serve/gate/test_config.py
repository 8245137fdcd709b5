"""`gate.yaml`: what is read, and the one line that says what is wrong with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_serve.cli.main import main
from sparse_serve.gate import GateConfig, GateRequest
from sparse_serve.runtime.errors import SettingsError

GOOD: dict[str, Any] = {
    "version": 1,
    "base": {"model": "dense"},
    "candidate": {"url": "http://127.0.0.1:8000", "name": "m"},
    "quality": {"texts": ["a.txt"], "max_kl": 0.1},
    "speed": {"clients": [1, 2], "budget_s": 60},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """`GOOD` with another value at the path, or without its key where the value is None."""
    config: Any = copy.deepcopy(GOOD)
    *folders, key = path.split(".")
    part = config
    for name in folders:
        part = part[name]
    part[key] = value
    if value is None:
        del part[key]
    return config


def test_a_file_is_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump(GOOD))
    config = GateConfig.load(tmp_path / "gate.yaml")
    assert config.base.model == tmp_path / "dense"
    assert config.quality is not None and config.quality.texts == [tmp_path / "a.txt"]
    assert config.speed is not None and config.speed.clients == [1, 2]
    assert config.candidate.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 2, "version: 2: input should be less than or equal to 1"),
        ("version", True, "version: True: input should be a valid integer"),
        ("version", 1.0, "version: 1.0: input should be a valid integer"),
        ("version", None, "version: missing"),
        ("qualty", {}, "qualty: unknown key"),
        ("quality.max_ppl", 0.1, "quality.max_ppl: unknown key"),
        ("quality.alpha", "0.05", "quality.alpha: '0.05': input should be a valid number"),
        ("quality.alpha", 0.5, "quality.alpha: 0.5: input should be less than 0.5"),
        ("quality.alpha", float("nan"), "quality.alpha: nan: "),
        ("quality.offline", "yes", "quality.offline: 'yes': input should be a valid boolean"),
        ("quality.texts", [], r"quality.texts: \[\]: "),
        ("quality.texts", ["a.txt", "a.txt"], "quality.texts: .*has an entry twice"),
        ("quality.texts", "a.txt", "quality.texts: 'a.txt': input should be a valid list"),
        ("speed.clients", [1, 0], r"speed.clients\[1\]: 0: input should be greater than or equal to 1"),
        ("speed.clients", [1, True], r"speed.clients\[1\]: True: input should be a valid integer"),
        ("speed.metrics", ["ttft_p0"], r"speed.metrics\[0\]: 'ttft_p0': expected throughput, goodput, or ttft_pN"),
        ("speed.metrics", ["goodput"], "speed: `goodput` needs `slo_ttft_ms`, `slo_e2e_ms` or both"),
        ("speed.budget_s", 0, "speed.budget_s: 0: input should be greater than 0"),
        ("base", {}, "base: give either `model`, a directory, or `url`"),
        ("base", {"model": "d", "url": "http://x"}, "base: give either `model`, a directory, or `url`"),
        ("base", {"model": "d", "name": "x"}, "base: `name` and `tokenizer` are for a target by `url`"),
        ("candidate.flags", ["--x"], "candidate: `flags` are for a target by `model`"),
        ("candidate.url", "http://a:99999", "candidate.url: 'http://a:99999': port out of range"),
        ("candidate.url", "http://[::1", "candidate.url: .*: invalid IPv6 URL"),
        ("candidate.url", "http://me:secret@a", "candidate.url: .*: has a user or a password"),
        ("candidate.url", "http://a/?key=1", "candidate.url: .*: has a query or a fragment"),
        ("candidate.url", "http://a#b", "candidate.url: .*: has a query or a fragment"),
        ("candidate.url", "localhost:8000", "candidate.url: 'localhost:8000': "),
    ],
)
def test_a_mistake_is_one_line_with_the_path_of_its_key(path: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^gate: {message}") as caught:
        GateConfig.of(changed(path, value))
    assert "\n" not in str(caught.value)


def test_a_gate_that_measures_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="gate: nothing to measure; give `quality`, `speed` or `tasks`"):
        GateConfig.of({name: GOOD[name] for name in ("version", "base", "candidate")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [", "is no YAML: while parsing"),
        ("version: 1\nversion: 1\n", "is no YAML: 'version' is given twice"),
        ("base: &a {model: x}\ncandidate: *a\n", "is no YAML: aliases are not read"),
        ("base: !!python/object/apply:os.getcwd []\n", "is no YAML: could not determine a constructor"),
        ("- 1\n", r"holds \[1\]; expected keys"),
        ("", "holds None; expected keys"),
        ("a: \x07", "is no YAML: unacceptable character"),
        ("[" * 5000, "is no YAML: "),
    ],
)
def test_what_is_no_gate_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        GateConfig.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_init_writes_a_file_that_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gate.yaml"
    assert main(["gate", "init", str(file)]) == 0
    config = GateConfig.load(file)
    assert config.quality is not None and config.quality.max_ppl_increase == 0.05
    text = file.read_text("utf-8")
    for name, least in (
        ("speed", {}),
        ("tasks", {"tasks": ["agreement", "arithmetic", "recall"], "max_samples": 1000}),
    ):
        commented = text.split(f"# {name}:")[1].split("\n\n")[0]
        shown = yaml.safe_load(f"{name}:" + commented.replace("\n#", "\n"))
        assert GateConfig.of({**GOOD, **shown}) == GateConfig.of({**GOOD, name: least}), "it shows the defaults"
    assert main(["gate", "init", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["gate", "run", str(file), "--out", str(tmp_path / "out")]) == 2, "there is no model of that name"
    assert main(["gate", "run", str(tmp_path / "none.yaml")]) == 2
    assert not (tmp_path / "out").exists()


def test_the_short_form_is_a_config(tmp_path: Path) -> None:
    request = GateRequest(dense="d", sparse="s", data="t.txt", max_windows=3, bos=False, allow_other_base=True)
    config = request.config()
    assert (config.base.model, config.candidate.model, config.allow_other_base) == (Path("d"), Path("s"), True)
    assert config.quality is not None
    assert (config.quality.texts, config.quality.max_windows, config.quality.bos) == ([Path("t.txt")], 3, False)


def test_a_calibration_is_the_base_against_itself_in_speed_alone() -> None:
    config = GateConfig.of(GOOD).calibration()
    assert config.candidate == config.base
    assert config.quality is None
    with pytest.raises(SettingsError, match="speed: missing"):
        GateConfig.of(changed("speed", None)).calibration()


def test_the_short_form_still_needs_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gate", "--dense", "x"])
    assert caught.value.code == 2
    assert "the following arguments are required: --sparse, --data" in capsys.readouterr().err

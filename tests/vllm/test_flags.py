"""vLLM's own parser, and which of its flags this server refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_serve.engine import vllm_defaults
from sparse_serve.engine.vllm_flags import parse, resolve
from sparse_serve.runtime.errors import SettingsError

FAMILIES = ("ssl_", "h11_", "uvicorn_", "disable_uvicorn_", "data_parallel_", "dp_supervisor_")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    return str(tmp_path)


def test_every_refused_flag_exists_and_no_relative_of_one_is_left_out(model: str) -> None:
    args = parse([model, "--data-parallel-size=2", "--max-model-len=64"], 0.0)
    assert args.model == model and args.max_model_len == 64
    assert vllm_defaults._REFUSED.keys() <= vars(args).keys()
    assert {name for name in vars(args) if name.startswith(FAMILIES)} - {
        "data_parallel_size"
    } <= vllm_defaults._REFUSED.keys()


@pytest.mark.parametrize(
    "flag",
    [
        "--root-path=/a",
        "--config=flags.yaml",
        "--api-server-count=2",
        "--ssl-cert-reqs=2",
        "--uvicorn-log-level=debug",
        "--disable-uvicorn-access-log",
        "--h11-max-header-count=9",
        "--data-parallel-size-local=2",
        "--data-parallel-external-lb",
    ],
)
def test_what_would_be_half_true_is_refused_by_name(model: str, flag: str) -> None:
    with pytest.raises(SettingsError, match=rf"{flag.split('=')[0]} cannot be used here: \w"):
        parse([model, flag], 0.0)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--enforce-eager=maybe", "--enforce-eager.*'maybe'"),
        ("--max-model-len=many", "--max-model-len: invalid .* value: 'many'"),
        ("--max-modle-len=9", "unrecognized arguments: --max-modle-len=9"),
        ("--dtype=float33", "--dtype: invalid choice: 'float33'"),
        ('--compilation-config={"modee": 1}', "^modee: Unexpected keyword argument; "),
        ("--enable-auto-tool-choice", "^--enable-auto-tool-choice requires --tool-call-parser"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(model: str, flag: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        parse([model, flag], 0.0)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_is_refused_with_what_to_do(model: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer_config.json")
    with pytest.raises(SettingsError, match=r"has no tokenizer \(tokenizer.json, .*--tokenizer"):
        resolve(parse([model], 0.0))
    with pytest.raises(SettingsError, match=r"--tokenizer is \./nowhere; expected a directory"):
        resolve(parse([model, "--tokenizer=./nowhere"], 0.0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.model").touch()
    resolve(parse([model, f"--tokenizer={tmp_path / 'other'}"], 0.0))
    resolve(parse([model, "--skip-tokenizer-init"], 0.0))


def test_pipeline_stages_are_refused_on_a_cpu(model: str) -> None:
    with pytest.raises(SettingsError, match=r"--pipeline-parallel-size 2: .*--tensor-parallel-size"):
        parse([model, "--pipeline-parallel-size=2"], 0.0)

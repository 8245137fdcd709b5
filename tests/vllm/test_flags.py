"""vLLM's own parser, and which of its flags this server refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_serve.engine import vllm_defaults
from sparse_serve.engine.vllm_engine import parse
from sparse_serve.runtime.errors import SettingsError

FAMILIES = ("ssl_", "h11_", "uvicorn_", "disable_uvicorn_", "data_parallel_", "dp_supervisor_")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    return str(tmp_path)


def test_every_refused_flag_exists_and_no_relative_of_one_is_left_out(model: str) -> None:
    args = parse([model, "--data-parallel-size=1", "--max-model-len=64"], 0.0)
    assert args.model == model and args.max_model_len == 64
    assert vllm_defaults._REFUSED.keys() <= vars(args).keys()
    assert {name for name in vars(args) if name.startswith(FAMILIES)} <= vllm_defaults._REFUSED.keys()


@pytest.mark.parametrize(
    "flag",
    [
        "--root-path=/a",
        "--api-server-count=2",
        "--ssl-cert-reqs=2",
        "--uvicorn-log-level=debug",
        "--disable-uvicorn-access-log",
        "--h11-max-header-count=9",
        "--data-parallel-size=2",
        "--data-parallel-external-lb",
    ],
)
def test_what_would_be_half_true_is_refused_by_name(model: str, flag: str) -> None:
    with pytest.raises(SettingsError, match=rf"{flag.split('=')[0]} cannot be used here: \w"):
        parse([model, flag], 0.0)


def test_pipeline_stages_are_refused_on_a_cpu(model: str) -> None:
    with pytest.raises(SettingsError, match=r"--pipeline-parallel-size 2: .*--tensor-parallel-size"):
        parse([model, "--pipeline-parallel-size=2"], 0.0)

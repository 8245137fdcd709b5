"""`maskgen` on 8-bit values and corrections, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from maskgen.api.requests import Codes
from maskgen.cli import parser as cli
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import PooledCorrection
from maskgen.core.values import CODE_DTYPES
from tests import models

ModelDir = Callable[..., Path]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_parser_knows_every_code() -> None:
    assert set(get_args(Codes)) == set(CODE_DTYPES)


@pytest.mark.parametrize("values", CODE_DTYPES)
def test_quantise_and_compress_write_the_same(
    values: str, model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = model_dir("llama", dtype=torch.bfloat16)
    models.save_sparse(dense, tmp_path / "float").save(tmp_path / "masks.safetensors")
    code, text, errors = run(capsys, "quantise", tmp_path / "float", "--values", values, "--out", tmp_path / "one")
    assert (code, errors) == (0, "")
    share = "(21." if values == "int4" else "(34."  # 18.75 % or 31.25, and the scales of very short rows
    assert "maskgen eval" in text and share in text
    masks = tmp_path / "masks.safetensors"
    assert run(capsys, "compress", dense, masks, "--values", values, "--out", tmp_path / "two")[0] == 0
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert f"pattern 2:4, {values} values" in run(capsys, "inspect", tmp_path / "one")[1]
    code, _, errors = run(capsys, "quantise", tmp_path / "one", "--values", "int8", "--out", tmp_path / "three")
    assert code == 2 and f"values {values} cannot become 'int8'" in errors


def test_decompress_says_that_corrections_are_folded_in(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.save_corrected(model_dir("llama"), tmp_path / "sparse", PooledCorrection(16, "trained"), "int8")
    told = run(capsys, "inspect", tmp_path / "sparse")[1]
    assert "of what is stored are corrections: kind pooled, segment 16, pool trained" in told
    code, text, _ = run(capsys, "decompress", tmp_path / "sparse", "--out", tmp_path / "dense")
    assert code == 0 and "corrections are folded into the weights" in text
    models.save_corrected(model_dir("llama"), tmp_path / "plain", None)
    assert "folded" not in run(capsys, "decompress", tmp_path / "plain", "--out", tmp_path / "dense2")[1]
    assert SparseCheckpoint.open(tmp_path / "plain").config.correction is None

"""A sparse checkpoint in transformers without `register()`: refused with the way out, never random weights.

Each case is a process of its own, as `register()` holds for the rest of one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maskgen.core.checkpoint import SparseCheckpoint, read_dense_config
from maskgen.core.config import GUARD, WEIGHTS_KEY
from maskgen.core.errors import FormatError
from maskgen.export.compress import decompress
from maskgen.export.quantise import quantise
from maskgen.hf import model
from tests import models
from tests.directories import edit_config

ModelDir = Callable[..., Path]
ROOT = Path(__file__).parents[3]

WAYS = {
    "causal": "T.AutoModelForCausalLM.from_pretrained(DIR)",
    "class": "T.LlamaForCausalLM.from_pretrained(DIR)",
    "headless": "T.AutoModel.from_pretrained(DIR)",
    "other head": "T.AutoModelForSequenceClassification.from_pretrained(DIR)",
    "pipeline": "T.pipeline('text-generation', model=DIR)",
    "half": "T.AutoModelForCausalLM.from_pretrained(DIR, dtype='float16', use_safetensors=True)",
    "config given": "T.AutoModelForCausalLM.from_pretrained(DIR, config=T.AutoConfig.from_pretrained(DIR))",
}


def python(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys, transformers as T\nDIR = sys.argv[1]\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def sparse(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unregistered") / "sparse"
    models.save_sparse(model_dir("llama"), directory)
    return directory


def test_every_way_of_loading_is_refused(sparse: Path) -> None:
    """One process for all of them: none registers."""
    tries = "".join(
        f"try:\n    {way}\n    print('LOADED')\nexcept Exception as error:\n    print(repr(str(error)))\n"
        for way in WAYS.values()
    )
    lines = python(tries, sparse).stdout.splitlines()
    assert len(lines) == len(WAYS)
    for way, line in zip(WAYS, lines, strict=True):
        assert "call maskgen.hf.loader.register() first" in line and "maskgen decompress DIR" in line, way


def test_a_script_ends_with_the_sentence(sparse: Path) -> None:
    done = python(WAYS["causal"], sparse)
    assert done.returncode == 1 and done.stderr.rstrip().endswith(GUARD)


def test_registered_it_loads_and_saves_as_dense(sparse: Path, tmp_path: Path) -> None:
    code = (
        "import maskgen.hf.loader\nmaskgen.hf.loader.register()\n"
        "model, info = T.AutoModelForCausalLM.from_pretrained(DIR, output_loading_info=True)\n"
        f"assert not any(info.values()), info\nmodel.save_pretrained({str(tmp_path / 'dense')!r})\n"
        "print(T.pipeline('text-generation', model=DIR)('On day', max_new_tokens=2)[0]['generated_text'])"
    )
    done = python(code, sparse)
    assert done.returncode == 0 and done.stdout.startswith("On day"), done.stderr
    assert WEIGHTS_KEY not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense, loaded = model.load(tmp_path / "dense").state_dict(), model.load(sparse).state_dict()
    assert all(torch.equal(dense[name], loaded[name]) for name in loaded)


def test_the_guard_goes_with_what_is_sparse(sparse: Path, tmp_path: Path) -> None:
    quantise(sparse, tmp_path / "int8", "int8")
    decompress(sparse, tmp_path / "dense")
    assert json.loads((tmp_path / "int8" / "config.json").read_text())[WEIGHTS_KEY] == GUARD
    assert WEIGHTS_KEY not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_checkpoints_without_a_guard_are_read(model_dir: ModelDir, tmp_path: Path) -> None:
    models.save_sparse(model_dir("llama"), tmp_path / "sparse")
    guarded = model.load(tmp_path / "sparse").state_dict()
    edit_config(tmp_path / "sparse", lambda config: config.pop(WEIGHTS_KEY))
    SparseCheckpoint.open(tmp_path / "sparse")
    loaded = model.load(tmp_path / "sparse").state_dict()
    assert all(torch.equal(loaded[name], guarded[name]) for name in guarded)


def test_the_name_of_another_file_is_never_followed(model_dir: ModelDir, tmp_path: Path) -> None:
    models.save_sparse(model_dir("llama"), tmp_path / "sparse")
    models.save("llama", tmp_path / "sparse" / "evil", seed=5)
    edit_config(tmp_path / "sparse", lambda config: config.update({WEIGHTS_KEY: "evil/model.safetensors"}))
    loaded = model.load(tmp_path / "sparse").state_dict()
    models.save_sparse(model_dir("llama"), tmp_path / "again")
    expected = model.load(tmp_path / "again").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    edit_config(tmp_path / "sparse" / "evil", lambda config: config.update({WEIGHTS_KEY: "other.safetensors"}))
    with pytest.raises(FormatError, match=r"names 'other\.safetensors' in transformers_weights"):
        read_dense_config(tmp_path / "sparse" / "evil")

"""`import maskgen`: light, complete, and without effects on the process it is used in."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as hf_logging

import maskgen

ModelDir = Callable[..., Path]


@pytest.mark.parametrize("name", maskgen.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    found = getattr(maskgen, name)
    if isinstance(found, type) or inspect.isfunction(found):
        assert found.__doc__


def test_names_are_listed_for_completion() -> None:
    assert set(maskgen.__all__) <= set(dir(maskgen))
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        maskgen.prunes  # noqa: B018


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(maskgen.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == maskgen._HOME_OF and set(seen) == set(maskgen.__all__)


def test_importing_and_asking_needs_no_torch() -> None:
    program = (
        "import sys, json, maskgen; maskgen.PruneRequest(recipe='wanda', model='m', out='o'); maskgen.SparseError; "
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "argparse", "rich"} & set(json.loads(done.stdout))


def test_only_the_command_line_knows_argparse_and_rich() -> None:
    program = (
        "import sys, json, maskgen; [getattr(maskgen, name) for name in maskgen.__all__]; "
        "print(json.dumps(sorted(name for name in sys.modules if name.startswith('maskgen.cli'))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def state() -> dict[str, object]:
    """What a notebook's owner would not want to find changed."""
    return {
        "log level": logging.getLogger().level,
        "log handlers": list(logging.getLogger().handlers),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "transformers": hf_logging.get_verbosity(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "random": torch.random.get_rng_state().tolist(),
    }


def test_the_process_is_left_as_it_was(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense = model_dir()
    before = state()
    small = {"calibration.window_tokens": 32, "calibration.samples": 4}
    maskgen.prune(
        maskgen.PruneRequest(recipe="sparsegpt", model=dense, data=text_file, out=tmp_path / "o", overrides=small)
    )
    maskgen.evaluate(maskgen.EvaluateRequest(model=tmp_path / "o", data=text_file, window_tokens=32, max_windows=2))
    small |= {"train.steps": 2, "train.batch": 2, "train.window_tokens": 16, "train.heldout_windows": 2}
    maskgen.learn(
        maskgen.LearnRequest(recipe="maskllm", model=dense, data=text_file, out=tmp_path / "l", overrides=small)
    )
    assert state() == before

"""The scripts of `deploy/`, which is no package."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest

from tests.architecture.source import ROOT

WITH_DEPLOY_TESTS = pytest.mark.skipif(
    os.environ.get("DEPLOY_TESTS") != "1",
    reason="starts whole hosts and waits for them, minutes of two cores that do nothing else: DEPLOY_TESTS=1 runs it",
)


def load(path: str) -> ModuleType:
    """A script as a module; `path` is below `deploy/`."""
    file = ROOT / "deploy" / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module

"""What makes tests the same on every machine.

One thread for tiny models: a second one only waits, and results do not depend on the number of cores. And no line of
progress for the time that has passed: a slow machine would print one where nothing else is expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from maskgen.cli import progress


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", math.inf)

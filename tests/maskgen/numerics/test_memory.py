"""Peak memory is this process's own, and grows with what it holds."""

from __future__ import annotations

import subprocess
import sys

import torch

from maskgen.numerics.memory import chunk_elements, peak_memory_bytes, peak_rss_bytes

CHILD = """
from maskgen.numerics.memory import peak_rss_bytes
before = peak_rss_bytes()
held = bytearray(300 << 20)
print(before, peak_rss_bytes())
"""


def test_the_peak_counts_what_the_process_holds_and_not_its_parent() -> None:
    held = bytearray(600 << 20)
    assert peak_rss_bytes() >= len(held)
    output = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert after - before >= 250 << 20
    assert before < len(held)
    assert peak_memory_bytes(torch.device("cpu")) == peak_rss_bytes()


def test_a_chunk_on_an_accelerator_is_larger() -> None:
    assert chunk_elements(torch.device("cpu")) < chunk_elements(torch.device("cuda"))

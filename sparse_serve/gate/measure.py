"""Measuring one model for the gate: offline with transformers, then through a served engine, on the same windows.

The offline side runs `maskgen eval` as a process of its own: another code base on purpose, and its memory is gone
before the engine starts. It writes the exact token windows it scored, and the engine scores those, so the two are
paired token by token and no second tokenizer call can disagree.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from maskgen.core.divergence import Divergence
from maskgen.core.perplexity import Perplexity, Protocol, Window, digest_windows
from sparse_serve.engine import Engine, EngineInfo
from sparse_serve.gate import footprint
from sparse_serve.gate.evidence import MemoryReading, Scores
from sparse_serve.runtime import processes
from sparse_serve.runtime.errors import GateError

logger = logging.getLogger(__name__)

CONCURRENT_WINDOWS = 32
STOP_GRACE_S = 20.0

MakeEngine = Callable[[Path], Engine]


@dataclass(frozen=True)
class Request:
    """What to measure: texts, windows and dtype (`float32`, `bfloat16` or `float16`) for both stacks.

    `bos` says whether windows begin with BOS; None: as the tokenizer does by itself.
    """

    data: tuple[Path, ...]
    window_tokens: int
    dtype: str
    max_windows: int | None = None
    bos: bool | None = None


@dataclass(frozen=True)
class Offline:
    """What `maskgen eval` measured on one text, with its protocol, and the windows it scored.

    `divergence` is that from the dense model it was compared with, None without one.
    """

    perplexity: Perplexity
    windows: list[Window]
    divergence: Divergence | None = None


def measure_offline(
    model_dir: Path, text: Path, request: Request, work_dir: Path, against: Path | None = None
) -> Offline:
    """Run `maskgen eval` on one text, with `against` also for the divergence from that model."""
    result_path, windows_path = work_dir / f"{model_dir.name}.json", work_dir / f"{model_dir.name}.windows.json"
    command = [sys.executable, "-m", "maskgen", "eval", str(model_dir), "--data", str(text)]
    command += ["--window", str(request.window_tokens), "--dtype", request.dtype]
    command += ["--json", str(result_path), "--windows-out", str(windows_path)]
    if request.max_windows is not None:
        command += ["--max-windows", str(request.max_windows)]
    if request.bos is not None:
        command += ["--bos" if request.bos else "--no-bos"]
    if against is not None:
        command += ["--against", str(against)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise GateError(f"{model_dir}: offline evaluation failed: {''.join(reason) or done.returncode}")
    result = json.loads(result_path.read_text("utf-8"))
    perplexity = Perplexity(
        Protocol(**result["protocol"]),
        result["nll_per_window"],
        result["scored_tokens_per_window"],
        result["tokens_digest"],
    )
    windows = [Window(**window) for window in json.loads(windows_path.read_text("utf-8"))]
    return Offline(perplexity, windows, _divergence(result.get("divergence")))


def _divergence(found: dict[str, Any] | None) -> Divergence | None:
    names = [field.name for field in fields(Divergence)]
    return None if found is None else Divergence(**{name: found[name] for name in names})


@dataclass(frozen=True)
class ServedScores:
    """What an engine said of itself, its scores of every text, and the memory it took (None: it cannot be known)."""

    info: EngineInfo
    scores: list[Scores]
    memory: MemoryReading | None


def measure_served(engine: Engine, texts: Sequence[Offline], directory: Path) -> ServedScores:
    """Start the engine of `directory`, score the windows of every text, stop it. Works inside of a running event loop
    too (a notebook's)."""
    scoring = _score(engine, texts, directory)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(scoring)
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(asyncio.run, scoring).result()


async def _score(engine: Engine, texts: Sequence[Offline], directory: Path) -> ServedScores:
    others, gpu_before = processes.descendants(os.getpid()), footprint.gpu_bytes()
    try:
        info = await engine.start()
        found = []
        for offline in texts:
            logger.info("%s: scoring %d windows through the engine", info.model, len(offline.windows))
            served = await score_windows(engine, offline.windows, offline.perplexity.protocol)
            assert served.tokens_digest == offline.perplexity.tokens_digest
            found.append(Scores(served, offline.perplexity))
        started = processes.descendants(os.getpid()) - others
        memory = footprint.read(started, directory, footprint.gpu_bytes_since(gpu_before))
    finally:
        await engine.stop(STOP_GRACE_S)
    return ServedScores(info, found, memory)


async def score_windows(engine: Engine, windows: list[Window], protocol: Protocol) -> Perplexity:
    """Mean negative log-likelihood of each window's scored tokens, through the engine."""
    slots = asyncio.Semaphore(CONCURRENT_WINDOWS)

    async def score(window: Window) -> float:
        async with slots:
            logprobs = (await engine.score(window.ids))[window.first_scored - 1 :]
        nll = -math.fsum(logprobs) / len(logprobs)
        if not math.isfinite(nll):
            raise GateError(f"the engine's mean log-probability of a window is {-nll}; try dtype float32")
        return nll

    nll = await asyncio.gather(*map(score, windows))
    scored = [len(window.ids) - window.first_scored for window in windows]
    return Perplexity(protocol, list(nll), scored, digest_windows(windows))

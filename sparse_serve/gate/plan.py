"""From what is asked to what will be done: everything that can be known to be right before measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from maskgen.core.checkpoint import SparseCheckpoint, check_directory
from maskgen.core.config import CONFIG_KEY
from maskgen.core.files import read_json
from sparse_serve.gate import lm_eval, results, tasks
from sparse_serve.gate.config import DType, GateConfig, QualityConfig
from sparse_serve.gate.evidence import Limits, SpeedEvidence
from sparse_serve.gate.measure import Request
from sparse_serve.gate.request import GateRequest
from sparse_serve.gate.targets import Target, check_base, find
from sparse_serve.gate.task_pack import Sample
from sparse_serve.runtime.errors import SettingsError

PARITY_TOLERANCE = {"float32": 0.001, "bfloat16": 0.01, "float16": 0.01}
"""Rounding of a dtype, as it shows in perplexity; beyond it something computes another function."""

MAX_WINDOW_TOKENS = 2048
PIECE_WINDOW_TOKENS = 512


@dataclass(frozen=True)
class MeasurementPlan:
    """What will be measured. `base_matches`: the candidate was made from the base (None: it cannot be known).

    `dtype` is what directories compute in, None without any. `request` is there for two directories that are measured
    offline and served. `samples` are those of every task that is not lm_eval's, by its name. `imported` are
    rounds of speed that were read from files, None where they are to be measured.
    """

    config: GateConfig
    base: Target
    candidate: Target
    base_matches: bool | None
    dtype: str | None
    request: Request | None
    limits: Limits
    samples: Mapping[str, Sequence[Sample]]
    imported: SpeedEvidence | None = None

    @property
    def lm_eval_tasks(self) -> list[str]:
        """Those that lm_eval runs."""
        return [] if self.config.tasks is None else list(filter(lm_eval.is_task, self.config.tasks.tasks))

    @property
    def targets(self) -> dict[str, Target]:
        """Both, by role."""
        return {"base": self.base, "candidate": self.candidate}


def plan(asked: GateConfig | GateRequest) -> MeasurementPlan:
    """Check directories, texts and what they say of each other. Raises `SettingsError` or `FormatError`."""
    if isinstance(asked, GateRequest):
        _check_short_form(asked)
        config = asked.config()
    else:
        config = asked
    base, candidate = find(config.base), find(config.candidate)
    matches = check_base(base, candidate, config.allow_other_base)
    described = next((target for target in (base, candidate) if target.directory is not None), None)
    dtype = None if described is None else config.dtype or stored_dtype(described.hf_config)
    request = None
    if config.quality is not None:
        _check_names("quality.texts", config.quality.texts)
        for text in config.quality.texts:
            if text.is_dir() or not text.exists():
                raise SettingsError(f"data {text}: no such file")
        if config.quality.offline and base.directory is not None and candidate.directory is not None and dtype:
            request = _request(config.quality, base, dtype)
    named = [] if config.tasks is None else config.tasks.tasks
    for task in filter(lm_eval.is_task, named):
        lm_eval.check(task)
    imported = results.read_rounds(config.speed) if config.speed is not None and config.speed.results else None
    if (config.speed is not None and imported is None) or any(map(lm_eval.is_task, named)):
        tokenizers(base, candidate)
    samples: dict[str, list[Sample]] = {}
    if config.tasks is not None:
        own = [task for task in named if not lm_eval.is_task(task)]
        _check_names("tasks.tasks", own)
        samples = {Path(task).name: tasks.read(task, config.tasks.max_samples) for task in own}
    limits = _limits(config, dtype)
    return MeasurementPlan(config, base, candidate, matches, dtype, request, limits, samples, imported)


def _check_names(where: str, paths: Sequence[str | Path]) -> None:
    """Reports name files without their folders."""
    names = [Path(path).name for path in paths]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise SettingsError(f"{where}: two are called {twice}, which is how reports name them; rename one")


def tokenizers(base: Target, candidate: Target) -> dict[str, Path]:
    """What `vllm bench serve` and lm_eval make prompts with, by role. `SettingsError` where none is known."""
    found = {}
    for role, target, other in (("base", base, candidate), ("candidate", candidate, base)):
        tokenizer = target.directory or target.config.tokenizer or other.directory or other.config.tokenizer
        if tokenizer is None:
            raise SettingsError(
                f"{role}.tokenizer: missing; `speed` and lm_eval need a directory with the tokenizer of the model"
            )
        if not tokenizer.is_dir():
            raise SettingsError(f"{role}.tokenizer: {tokenizer}: no such directory")
        found[role] = tokenizer
    return found


def _check_short_form(request: GateRequest) -> None:
    """The short form compares a sparse checkpoint with its dense base, and nothing else."""
    SparseCheckpoint.open(request.sparse)
    check_directory(request.dense)
    if CONFIG_KEY in read_json(request.dense / "config.json"):
        raise SettingsError(f"dense model {request.dense} has a {CONFIG_KEY}; expected a model that is not quantised")


def _request(quality: QualityConfig, base: Target, dtype: str) -> Request:
    window = default_window(base.hf_config) if quality.window_tokens is None else quality.window_tokens
    context = base.hf_config.get("max_position_embeddings")
    if type(context) is int and window >= context:
        raise SettingsError(
            f"window of {window} tokens: the model reads {context} tokens, so at most {context - 1} can be scored"
        )
    return Request(tuple(quality.texts), window, dtype, quality.max_windows, quality.bos)


def _limits(config: GateConfig, dtype: str | None) -> Limits:
    limits: dict[str, Any] = {}
    quality, speed = config.quality, config.speed
    if quality is not None:
        tolerance = PARITY_TOLERANCE[dtype or "bfloat16"]
        limits |= {
            "max_ppl_increase": quality.max_ppl_increase,
            "parity_tolerance": tolerance if quality.parity_tolerance is None else quality.parity_tolerance,
            "alpha": quality.alpha,
            "max_kl": quality.max_kl,
            "max_flips": quality.max_flips,
        }
    if speed is not None:
        limits |= {"max_slowdown": speed.max_slowdown, "floor_ms": speed.floor_ms, "speed_alpha": speed.alpha}
    if config.tasks is not None:
        limits |= {"max_task_drop": config.tasks.max_drop, "task_alpha": config.tasks.alpha}
    return Limits(**limits)


def stored_dtype(hf_config: dict[str, Any]) -> str:
    """The checkpoint's dtype, from `config.json` (`dtype`, or `torch_dtype` in older files)."""
    dtype, known = hf_config.get("dtype", hf_config.get("torch_dtype")), get_args(DType)
    if dtype not in known:
        raise SettingsError(f"config.json names dtype {dtype!r}; give a dtype, one of {list(known)}")
    return str(dtype)


def default_window(hf_config: dict[str, Any]) -> int:
    """2048 tokens, or half the context of a model that has less than twice that."""
    context = hf_config.get("max_position_embeddings")
    return min(MAX_WINDOW_TOKENS, context // 2) if type(context) is int and context >= 4 else MAX_WINDOW_TOKENS

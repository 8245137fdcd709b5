"""Running the gate: measure both targets as planned, let every file of `checks/` judge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sparse_serve.gate.checks as checks_folder
from maskgen.core.registry import load, names
from sparse_serve.engine import Engine
from sparse_serve.gate import footprint, lm_eval, served, speed, tasks
from sparse_serve.gate.endpoint import Endpoint
from sparse_serve.gate.evidence import Evidence, Limits, MemoryReading, TaskEvidence, TextEvidence
from sparse_serve.gate.measure import MakeEngine, ServedScores, measure_offline, measure_served
from sparse_serve.gate.plan import PIECE_WINDOW_TOKENS, MeasurementPlan, tokenizers
from sparse_serve.gate.provenance import environment_of, packed_fraction, provenance
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.request import GateStep, OnStep
from sparse_serve.gate.targets import Target
from sparse_serve.gate.verdict import CheckResult, Verdict
from sparse_serve.runtime import environment, processes
from sparse_serve.runtime.errors import GateError
from sparse_serve.runtime.load import serving, temporary
from sparse_serve.tuning import parity_file
from sparse_serve.tuning.parity_file import KernelParity

EngineFactory = Callable[[str, int, tuple[str, ...]], MakeEngine]


@dataclass
class _Steps:
    """Counts the measurements of a plan."""

    steps: int
    on_step: OnStep
    number: int = field(default=0)

    def begin(self, what: str) -> None:
        self.number += 1
        self.tell(what)

    def tell(self, what: str) -> None:
        self.on_step(GateStep(self.number, self.steps, what))


def run(
    todo: MeasurementPlan, engine_factory: EngineFactory | None = None, on_step: OnStep = lambda step: None
) -> GateReport:
    """Measure both targets and judge.

    `engine_factory` takes a dtype, a context length in tokens and flags; default: vLLM's. Environment variables that
    starting engines sets are put back as they were (`environment.restored`).
    """
    through_servers = todo.config.quality is not None and todo.request is None
    both_stacks = 4 if todo.request is not None else 0
    wants_speed = todo.config.speed is not None and todo.imported is None
    wants_tasks = todo.config.tasks is not None
    steps = _Steps(both_stacks + through_servers + wants_tasks + wants_speed, on_step)
    kernels: dict[str, list[KernelParity]] = {}
    evidence: dict[str, Any] = {"packed_fraction": packed_fraction(todo), "kernels": kernels, "speed": todo.imported}
    with environment.restored(), temporary("sparse-serve-gate-") as work:
        if todo.request is not None:
            evidence |= _both_stacks(todo, engine_factory or _vllm_engine, work, steps, kernels)
        if through_servers or wants_tasks or wants_speed:
            with _servers(todo, work, steps, kernels) as servers:
                if through_servers:
                    steps.begin("both targets through their servers")
                    evidence["texts"] = _through_servers(todo, servers, steps)
                if wants_tasks:
                    steps.begin("tasks")
                    evidence["tasks"] = _tasks(todo, servers, work, steps)
                if todo.config.speed is not None and wants_speed:
                    steps.begin("speed")
                    evidence["speed"] = speed.measure(servers, todo.config.speed, todo.limits, work, steps.tell)
                evidence["memory"] = _memory(todo, servers)
    measured = Evidence(**evidence)
    return GateReport(judge(measured, todo.limits), measured, todo.limits, provenance(todo), environment_of(todo))


def not_measured(todo: MeasurementPlan, reason: str) -> GateReport:
    """The report of a run that could not measure: an error, so that a pipeline finds it where it looks for verdicts."""
    result = CheckResult("measurement", Verdict.ERROR, " ".join(reason.split()), {})
    return GateReport([result], Evidence(), todo.limits, provenance(todo), environment_of(todo))


def _both_stacks(
    todo: MeasurementPlan, factory: EngineFactory, work_dir: Path, steps: _Steps, kernels: dict[str, list[KernelParity]]
) -> dict[str, Any]:
    """Two directories: offline with transformers, then served, on the same windows of every text."""
    request = todo.request
    assert request is not None
    measured: dict[str, ServedScores] = {}
    dense, compared = todo.base.directory, []
    wants_divergence = todo.limits.max_kl is not None or todo.limits.max_flips is not None
    for role, target in todo.targets.items():
        assert target.directory is not None
        if target.config == todo.base.config and "base" in measured and not wants_divergence:
            measured[role] = measured["base"]  # a recording
            continue
        steps.begin(f"{role} offline (transformers)")
        options = {"against": dense} if wants_divergence and role == "candidate" else {}
        compared = [measure_offline(target.directory, text, request, work_dir, **options) for text in request.data]
        steps.begin(f"{role} served (vLLM)")
        make_engine = factory(request.dtype, request.window_tokens + 1, tuple(target.config.flags))
        with environment.restored(), _kernels_compared(role, target, work_dir, kernels):
            measured[role] = measure_served(make_engine(target.directory), compared, target.directory)
    base, candidate = measured["base"], measured["candidate"]
    pairs = zip(request.data, base.scores, candidate.scores, compared, strict=True)
    texts = [TextEvidence(text.name, left, right, offline.divergence) for text, left, right, offline in pairs]
    if any(text.base.served.tokens_digest != text.candidate.served.tokens_digest for text in texts):
        raise GateError("the two models tokenise the text differently; perplexities per token cannot be compared")
    memory = {role: found.memory for role, found in measured.items() if found.memory is not None}
    return {"texts": texts, "base_engine": base.info, "candidate_engine": candidate.info, "memory": memory}


@contextlib.contextmanager
def _kernels_compared(
    role: str, target: Target, work_dir: Path, kernels: dict[str, list[KernelParity]]
) -> Iterator[None]:
    """The sparse layers that are loaded meanwhile, once for each target, are compared with the exact product."""
    if target.checkpoint is None or role in kernels:
        yield
        return
    folder = work_dir / f"kernels-{role}"
    folder.mkdir()
    with environment.kernel_parity(folder):
        yield
    kernels[role] = parity_file.read(folder)


@contextlib.contextmanager
def _servers(
    todo: MeasurementPlan, work_dir: Path, steps: _Steps, kernels: dict[str, list[KernelParity]]
) -> Iterator[dict[str, speed.Served]]:
    """Both targets as running servers: a directory is served for as long as this lasts."""
    processes.lead()  # servers end with this process however it ends
    wants_tokenizers = (todo.config.speed is not None and todo.imported is None) or bool(todo.lm_eval_tasks)
    for target in todo.targets.values():
        if target.config.url is not None:  # before minutes are spent on a server for the other one
            with Endpoint(target.config.url, target.config.name) as endpoint:
                endpoint.check_answers()
    known: Mapping[str, Path] = tokenizers(todo.base, todo.candidate) if wants_tokenizers else {}
    with contextlib.ExitStack() as stack:
        found: dict[str, speed.Served] = {}
        for role, target in todo.targets.items():
            url = target.config.url
            if target.config == todo.base.config and "base" in found:
                found[role] = found["base"]  # a calibration
                continue
            gpu_before = footprint.gpu_bytes()
            if target.directory is not None:
                steps.tell(f"starting the server of the {role}")
                folder = work_dir / role
                folder.mkdir()
                flags = ["--dtype", todo.dtype or "auto", "--no-enable-prefix-caching", *target.config.flags]
                with _kernels_compared(role, target, work_dir, kernels):
                    url = stack.enter_context(serving(target.directory, flags, folder))
            assert url is not None
            with Endpoint(url, target.config.name) as endpoint:  # the load generator understands vLLM's list only
                own_gpu = None if target.directory is None else footprint.gpu_bytes_since(gpu_before)
                found[role] = speed.Served(endpoint.url, endpoint.model, known.get(role, work_dir), own_gpu)
        yield found


def _memory(todo: MeasurementPlan, servers: Mapping[str, speed.Served]) -> dict[str, MemoryReading]:
    """Of the servers that listen on this host, so far."""
    found = {}
    for role, one in servers.items():
        pid = speed.listening_process(one.url)
        family = set() if pid is None else footprint.tree(pid)
        reading = footprint.read(family, todo.targets[role].directory, one.gpu_bytes)
        if reading is not None:
            found[role] = reading
    return found


def _through_servers(todo: MeasurementPlan, servers: Mapping[str, speed.Served], steps: _Steps) -> list[TextEvidence]:
    quality = todo.config.quality
    assert quality is not None
    found = []
    base, candidate = servers["base"], servers["candidate"]
    with Endpoint(base.url, base.model) as left, Endpoint(candidate.url, candidate.model) as right:
        for text in quality.texts:
            cut = served.read_pieces(text, quality.window_tokens or PIECE_WINDOW_TOKENS, quality.max_windows)
            found.append(served.measure(text.name, cut, left, right, quality.top_k, steps.tell))
    return found


def _tasks(
    todo: MeasurementPlan, servers: Mapping[str, speed.Served], work_dir: Path, steps: _Steps
) -> list[TaskEvidence]:
    base, candidate = servers["base"], servers["candidate"]
    with Endpoint(base.url, base.model) as left, Endpoint(candidate.url, candidate.model) as right:
        found = [tasks.measure(name, samples, left, right, steps.tell) for name, samples in todo.samples.items()]
    most = None if todo.config.tasks is None else todo.config.tasks.max_samples
    for name in todo.lm_eval_tasks:
        found += lm_eval.measure(name, servers, most, work_dir, steps.tell)
    return found


def judge(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Run every check of the folder, on what there is of its evidence."""
    checks = (load(checks_folder, name, GateError) for name in names(checks_folder))
    return [result for check in checks for result in check.run(evidence, limits)]


def _vllm_engine(dtype: str, context_tokens: int, more: tuple[str, ...]) -> MakeEngine:
    from sparse_serve.engine.vllm_engine import VllmEngine
    from sparse_serve.engine.vllm_weights import WeightChecks

    flags = ["--dtype", dtype, "--max-model-len", str(context_tokens), "--disable-log-stats", *more]

    def make(model_dir: Path) -> Engine:
        # A report is kept and passed on: it names the model, not where it lay on this machine.
        command = [*flags, "--served-model-name", model_dir.resolve().name]
        # What it answers is measured: nothing needs to be guessed from its weights.
        return VllmEngine(str(model_dir), command, weight_checks=WeightChecks(allow_zeros=True))

    return make

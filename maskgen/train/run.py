"""A learned run: dense model + text -> (prior) -> training -> result.

All that is needed to go on after a kill is in OUT.work until the result is written:

    run.json              whose directory this is: digest over recipe, weights, data, prior, device, torch
    prior/                the one-shot sweep that makes what to start from (`prior`)
    prior.safetensors     its masks, once the sweep is done
    start/                or its masks and weights, as a sparse checkpoint
    tokens/               the text as token ids (`data.corpus`)
    checkpoints/          what is learned (`checkpoints`)
    steps.json            how many steps fit into the time that was asked for (`budget`)
    log.jsonl             every step (`log`), kept beside the result
"""

from __future__ import annotations

import gc
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskgen.core.digest import StoredModel, digest_json, digest_weights
from maskgen.core.mask import MaskSet
from maskgen.core.quality import Quality, stored
from maskgen.data.corpus import Corpus, load_corpus
from maskgen.export import compress
from maskgen.export import slice as slice_module
from maskgen.export.allocation import Allocation, dense_layers, read_allocation, stored_allocation
from maskgen.hf import model, planning
from maskgen.hf.layers import stored_shapes
from maskgen.hf.planning import Planned
from maskgen.methods.learned import LearnedMethod, Result
from maskgen.recipes.recipe import RECIPE_FILE, Recipe
from maskgen.sweep.layers import check_prior
from maskgen.sweep.report import Progress
from maskgen.sweep.workdir import TOKENS_FOLDER, reserve_for_run
from maskgen.train import result
from maskgen.train.budget import Budget, any_steps, passes_s, with_steps
from maskgen.train.checkpoints import Checkpoints
from maskgen.train.compiled import compile_session, pays
from maskgen.train.heldout import measure_quality
from maskgen.train.job import Job
from maskgen.train.log import LOG_FILE, WORK_LOG_FILE, read
from maskgen.train.loop import HeldOut, Stage, fit
from maskgen.train.parallel import ALONE, Group, joined
from maskgen.train.prepare import prepare
from maskgen.train.prior import check_base, make_prior, make_start
from maskgen.train.result import Origin, Written
from maskgen.train.step import Session, TrainingStep

PROVENANCE_FILE = "maskgen_provenance.json"
"""Digests of everything a result was made from, written beside the weights."""

Event = Planned | Stage | Progress | TrainingStep | HeldOut
"""What a run tells of its progress; `Progress` is the prior's."""


@dataclass(frozen=True)
class Learned:
    """What a run did: the records of its log (`maskgen.train.log`), what was written, and how good that is.

    `quality` was measured on held-out text; or it is why it was not. `allocation` says how a budget was spent.
    """

    records: Sequence[Mapping[str, Any]]
    written: Written
    quality: Quality | str
    allocation: Allocation | None = None


def learn(job: Job, progress: Callable[[Event], None]) -> Learned | None:
    """Run a learned method from its newest checkpoint, if there is one, to its result.

    In a group of processes only the first one writes, calls `progress` and returns something. Raises every
    `SparseError` and `OSError`; the work directory stays, for the next attempt. That no other process is at work on the
    same output is the caller's part (`maskgen.core.lock`).
    """
    with joined(job.device, job.shard) as group:
        tell = progress if group.first else _ignore
        tell(job.planned)
        if job.budget is not None:
            job = _with_steps(job, job.budget, group, tell)
        start = _begin(job, group, tell)
        job = replace(job, start=start.origin.start, allocation=start.allocation)
        tell(Stage("loading"))
        session, dense = _session(job, start.prior, group, start.compiled)
        header = _header(job, session, start)
        bits = None if start.prior is None else start.prior.bitmasks
        tell(Stage("training"))
        fit(session, start.corpus, job.work / WORK_LOG_FILE, header, start.checkpoints, bits, job.cadence, tell)
    if not group.first:
        return None
    if group.world > 1:  # what is split over processes is put together from its last checkpoint
        del session
        gc.collect()
        session, dense = _session(_assembly(job), start.prior, ALONE)
        start.checkpoints.restore_model(session)
    tell(Stage("measuring"))
    names = [file.name for file in job.data]
    quality = measure_quality(session, start.corpus, names, job.recipe, job.model_dir)
    tell(Stage("writing"))
    for model_files in start.weights:
        model_files.check()
    log_file = job.work / WORK_LOG_FILE
    extra = {RECIPE_FILE: job.recipe.resolved(), PROVENANCE_FILE: start.provenance, LOG_FILE: log_file}
    extra |= {**stored(quality), **stored_allocation(job.allocation)}
    written = result.write(session, start.origin, job.out, dense, extra, job.masks_out)
    return Learned(read(log_file), written, quality, job.allocation)


def _with_steps(job: Job, budget: Budget, group: Group, tell: Callable[[Event], None]) -> Job:
    """The job with as many steps as fit into its time: found once, by process 0, then in OUT.work.

    A run of so many steps that it is compiled is timed again, compiled.
    """
    start = _begin(job, group, partial(_checked, budget, tell))
    if stored := group.broadcast(partial(budget.stored, job.work)):
        return replace(job, recipe=with_steps(job.recipe, int(stored)))
    tell(Stage("timing"))
    found = _fitting(job, start, budget, group, compiled=False)
    if _compiles(found, group):
        faster = _fitting(job, start, budget, group, compiled=True)
        found = faster if _compiles(faster, group) else found
    assert found.recipe.train is not None
    group.broadcast(partial(budget.store, job.work, found.recipe.train.steps))
    return found


def _checked(budget: Budget, tell: Callable[[Event], None], event: Event) -> None:
    """Pass an event on; one of the prior may end the run, when there will be no time left after it."""
    tell(event)
    if isinstance(event, Progress):
        budget.check_prior(event)


def _fitting(job: Job, start: _Start, budget: Budget, group: Group, compiled: bool) -> Job:
    """The job with the number of steps that fit by the time they take now. What is timed is let go of."""
    started = replace(job, start=start.origin.start, allocation=start.allocation)
    session, _ = _session(started, start.prior, group, compiled)
    times_s = passes_s(session, start.corpus, job.cadence.micro_batch)
    spec = session.spec
    del session
    gc.collect()
    steps = group.broadcast(lambda: str(budget.steps(times_s, spec, job.cadence)))
    return replace(job, recipe=with_steps(job.recipe, int(steps)))


@dataclass(frozen=True)
class _Start:
    """What is settled before the model is loaded: where it all comes from, where it goes on from, and whether its
    computations are compiled."""

    origin: Origin
    corpus: Corpus
    prior: MaskSet | None
    provenance: Mapping[str, Any]
    checkpoints: Checkpoints
    weights: Sequence[StoredModel]
    compiled: bool
    allocation: Allocation | None


def _begin(job: Job, group: Group, tell: Callable[[Event], None]) -> _Start:
    """Read the text, claim the work directory, find or make the prior."""
    wanted, method = job.recipe, job.recipe.build_method()
    assert isinstance(method, LearnedMethod) and wanted.train is not None
    start, prior, allocation = job.start, job.prior, job.allocation
    sources = [job.model_dir] if start is None else [job.model_dir, start.checkpoint.path]
    weights = [StoredModel.of(source) for source in sources]
    base_digest, *start_digest = [group.broadcast(partial(digest_weights, source)) for source in sources]
    check_base(prior, job.model_dir, base_digest)
    with group.first_leads():
        corpus = read_corpus(wanted, job.data, job.model_dir, job.work / TOKENS_FOLDER, job.bos)
        digests = {
            "recipe": wanted.digest(),
            "base": base_digest,
            "data": corpus.digest(),
            "prior": None if prior is None else prior.digest(),
        }
        if start_digest:
            (digests["start"],) = start_digest
        compiled = _compiles(job, group)
        arithmetic = {"device": torch.device(job.device).type, "torch": str(torch.__version__), "compiled": compiled}
        run_digest = digest_json({**digests, **arithmetic})
        known_by = run_digest
        if job.budget is not None:  # whatever number of steps fits
            known_by = digest_json({**digests, **arithmetic, "recipe": any_steps(wanted).digest(), "compiled": None})
        reserve_for_run(job.work, known_by)
        if start is None and method.uses_prior_weights:
            start = make_start(wanted, corpus, job.model_dir, job.label, job.work, base_digest, group, tell)
            weights.append(StoredModel.of(start.checkpoint.path))
            digests["start"] = digest_weights(start.checkpoint.path)
            allocation = read_allocation(start.checkpoint.path)
        elif prior is None and start is None and method.uses_prior:
            prior, allocation = make_prior(wanted, corpus, job.model_dir, job.work, base_digest, group, tell)
            digests["prior"] = prior.digest()
    origin = Origin(job.model_dir, job.label, base_digest, wanted.digest(), wanted.pattern, start)
    checkpoints = Checkpoints(job.work / "checkpoints", run_digest, job.cadence.keep_checkpoints)
    digests["run"] = run_digest
    return _Start(origin, corpus, prior, digests, checkpoints, weights, compiled, allocation)


def _compiles(job: Job, group: Group) -> bool:
    """Whether what trains is compiled."""
    method = job.recipe.build_method()
    assert isinstance(method, LearnedMethod) and job.recipe.train is not None
    weights = sum(math.prod(shape) for shape in stored_shapes(job.model_dir).values())
    return method.trains_weights and pays(weights, job.recipe.train, job.device, group.world)


def _ignore(event: Event) -> None:
    """Of a process that does not speak."""


def _assembly(job: Job) -> Job:
    """The run as it is put together again to be written: without the teacher and what else only training needs."""
    assert job.recipe.train is not None
    train = job.recipe.train.model_copy(update={"distill_weight": 0.0})
    return replace(job, recipe=job.recipe.model_copy(update={"train": train}), checkpoint_activations=False)


def read_corpus(
    wanted: Recipe, files: Sequence[Path], model_dir: Path, cache_dir: Path, bos: bool | None = None
) -> Corpus:
    """Training and held-out windows of the text, as the recipe wants them; tokenised once, into `cache_dir`."""
    assert wanted.train is not None
    tokenizer = model.load_tokenizer(model_dir)
    corpus = load_corpus(files, tokenizer, wanted.train, cache_dir, bos)
    vocabulary = tokenizer.get_vocab()
    for windows_ST in (*corpus.files, corpus.heldout):
        model.check_ids(windows_ST, vocabulary, model_dir)
    return corpus


def _session(job: Job, prior: MaskSet | None, group: Group, compiled: bool = False) -> tuple[Session, list[str]]:
    """Load the model and replace its layers; and the names of the linear layers that stay as they are.

    What is trained is float32; frozen weights stay as they are stored, unless the run is to compute in float32. What
    would stand in the way of writing the result is said here, before the first step.
    """
    wanted, method, model_dir = job.recipe, job.recipe.build_method(), job.model_dir
    assert isinstance(method, LearnedMethod) and wanted.train is not None
    in_float32 = method.trains_weights or wanted.train.scope != "targets" or wanted.train.torch_dtype is torch.float32
    device = "cpu" if group.shard else group.device  # sharding moves a block at a time
    loaded = model.load(model_dir, torch.float32 if in_float32 else "auto", device)
    plan = planning.plan_of(model_dir, wanted.pattern, wanted.ignore, loaded, dense_layers(job.allocation))
    targets = [(name, linear) for block in plan.targets for name, linear in block.items()]
    if method.result is Result.SPARSE:
        compress.check_source(model_dir, wanted.pattern, [name for name, _ in targets], plan.listed)
    if prior is not None:
        check_prior(prior.mask, dict(targets), wanted.pattern)
    units = slice_module.units(loaded) if method.result is Result.SLICED else {}
    mask = None if prior is None else prior.mask
    session = prepare(
        loaded, plan, units, method, wanted.train, mask, wanted.pattern, group, job.checkpoint_activations, job.start
    )
    result.check(session, model_dir)
    if compiled:
        compile_session(session, plan.blocks, job.cadence.micro_batch)
    return session, [*plan.listed, *(name for name, _ in targets if name not in session.layers)]


def _header(job: Job, session: Session, start: _Start) -> dict[str, Any]:
    """First line of the log."""
    return {
        "recipe": job.recipe.resolved(),
        "digests": start.provenance,
        "model": job.label,
        "data": [file.name for file in job.data],
        "training_windows": sum(len(windows) for windows in start.corpus.files),
        "heldout_windows": len(start.corpus.heldout),
        "bos": asdict(start.corpus.bos),
        "layers": {name: [layer.out_features, layer.in_features] for name, layer in session.layers.items()},
        "trained_parameters": sum(parameter.numel() for parameter in session.parameters),
        "reference": "start" if start.prior is None else "prior",
        "torch": str(torch.__version__),
        "hardware": {
            "device": str(session.device),
            "name": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else platform.machine(),
            "processes": session.group.world,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        },
    }

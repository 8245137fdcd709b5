"""The learned branch of `maskgen run`: dense model + text -> (prior) -> training -> result.

All that is needed to go on after a kill is in OUT.work until the result is written:

    run.json              whose directory this is: digest over recipe, weights, data, prior, device, torch
    prior/                the one-shot sweep that makes the mask to start from (`sweep.workdir`)
    prior.safetensors     that mask, once the sweep is done
    tokens/               the text as token ids (`data.corpus`)
    checkpoints/          what is learned (`checkpoints`)
    log.jsonl             every step (`log`), kept beside the result

Text held out from training is held out from the prior's calibration too.

Legend: S = windows, T = tokens.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.cli import display
from maskgen.core.digest import digest_json, digest_weights
from maskgen.core.errors import DataError, FormatError, ModelError, RecipeError
from maskgen.core.mask import MaskSet
from maskgen.data import tokens
from maskgen.data.corpus import Corpus, load_corpus
from maskgen.export import compress as compressor
from maskgen.export import slice as slicer
from maskgen.hf import model
from maskgen.methods.learned import LearnedMethod, Result
from maskgen.recipes.recipe import RECIPE_FILE, Recipe
from maskgen.sweep.driver import sweep
from maskgen.sweep.workdir import TOKENS_FOLDER, locked, reserve_for_run, work_dir
from maskgen.train import result as export
from maskgen.train.checkpoints import Checkpoints
from maskgen.train.log import LOG_FILE, WORK_LOG_FILE, read
from maskgen.train.loop import Cadence, fit
from maskgen.train.parallel import ALONE, Group, joined
from maskgen.train.result import Origin
from maskgen.train.step import Session, prepare

PROVENANCE_FILE = "maskgen_provenance.json"
"""Digests of everything a result was made from, written beside the weights."""

PRIOR_FILE = "prior.safetensors"
"""In OUT.work: the masks that the recipe's [prior] made."""


_TRAINING_FLAGS = (
    "micro_batch",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "checkpoint_activations",
    "shard",
)


def learn(args: argparse.Namespace, wanted: Recipe, model_dir: Path, label: str, device: str) -> bool:
    """Run a recipe of a learned method; `wanted` is settled for the model. Raises every `SparseError` and `OSError`.

    Returns whether it was this process that wrote the result.
    """
    method = wanted.build_method()
    assert isinstance(method, LearnedMethod) and wanted.train is not None
    cadence = Cadence(
        args.micro_batch or 8, args.eval_every or 0, args.checkpoint_every or 0, args.keep_checkpoints or 2
    )
    given = _checked(args, wanted, method)
    work = work_dir(args.out)
    with ExitStack() as held:
        with joined(device, args.shard) as group:
            base_digest = group.broadcast(lambda: digest_weights(model_dir))
            check_prior(given, args.prior, model_dir, base_digest)
            origin = Origin(model_dir, label, base_digest, wanted.digest(), wanted.pattern)
            with group.first_leads():
                corpus = read_corpus(wanted, args.data, model_dir, work / TOKENS_FOLDER)
                digests = {
                    "recipe": origin.recipe_digest,
                    "base": origin.base_digest,
                    "data": corpus.digest(),
                    "prior": None if given is None else given.digest(),
                }
                arithmetic = {"device": torch.device(device).type, "torch": str(torch.__version__)}
                run_digest = digest_json({**digests, **arithmetic})
                reserve_for_run(work, run_digest)
                if group.first:
                    held.enter_context(locked(work))
                prior = given
                if prior is None and method.uses_prior:
                    prior = _prior(wanted, corpus, model_dir, work, origin.base_digest, group)
                    digests["prior"] = prior.digest()
            provenance = {**digests, "run": run_digest}
            checkpoints = Checkpoints(work / "checkpoints", run_digest, cadence.keep_checkpoints)
            log_file = work / WORK_LOG_FILE
            with display.bar(quiet=not group.first) as bar:
                task = bar.add_task("loading", total=None, note="")
                session, dense = _session(wanted, method, model_dir, prior, group, args.checkpoint_activations)
                header = _header(wanted, session, corpus, args.data, label, provenance)
                show = display.training_progress(bar, task)
                bits = None if prior is None else prior.bitmasks
                fit(session, corpus, log_file, header, checkpoints, bits, cadence, show)
        if not group.first:
            return False
        if group.world > 1:  # what is split over processes is put together from its last checkpoint
            del session
            gc.collect()
            untaught = wanted.model_copy(update={"train": wanted.train.model_copy(update={"distill_weight": 0.0})})
            session, dense = _session(untaught, method, model_dir, prior, ALONE)
            checkpoints.restore_model(session)
        display.print_training(read(log_file), args.out / LOG_FILE)
        extra = {RECIPE_FILE: wanted.resolved(), PROVENANCE_FILE: provenance, LOG_FILE: log_file}
        _write(args, session, dense, origin, extra)
    return True


def _checked(args: argparse.Namespace, wanted: Recipe, method: LearnedMethod) -> MaskSet | None:
    """`given_prior`, and that what is given and wanted goes with the method."""
    name = wanted.method.name
    if args.masks_out is not None and method.result is not Result.SPARSE:
        raise RecipeError(f"--masks-out {args.masks_out}: {name} writes a dense model, without masks; leave it out")
    given = given_prior(args.prior, method.uses_prior, wanted)
    if method.uses_prior and given is None and wanted.prior is None:
        raise RecipeError(f"{name} starts from a mask: give --prior FILE, or a [prior] section in the recipe")
    return given


def refuse_training_flags(args: argparse.Namespace, wanted: Recipe) -> None:
    """`RecipeError` for a flag that a one-shot method has no use for."""
    for flag in _TRAINING_FLAGS:
        if getattr(args, flag):
            name = "--" + flag.replace("_", "-")
            raise RecipeError(f"{name}: {wanted.method.name} is a one-shot method and does not train; leave it out")


def given_prior(path: Path | None, used: bool, wanted: Recipe) -> MaskSet | None:
    """The masks of `--prior`, checked against the recipe; `check_prior` compares them with the model."""
    if path is None:
        return None
    if not used:
        raise RecipeError(f"--prior {path}: {wanted.method.name} with these options starts from no mask; leave it out")
    masks = compressor.load_masks(path)
    if masks.pattern != wanted.pattern:
        raise RecipeError(f"--prior {path}: its pattern is {masks.pattern}, the recipe's is {wanted.pattern}")
    return masks


def check_prior(masks: MaskSet | None, path: Path, model_dir: Path, base_digest: str) -> None:
    """Raise `FormatError` if `--prior` was made for other weights than the model's."""
    if masks is not None and masks.base_digest != base_digest:
        raise FormatError(
            f"--prior {path}: made for the weights {masks.base_digest}, but {model_dir} has {base_digest}; a mask is "
            "only valid for the weights it was chosen for"
        )


def read_corpus(wanted: Recipe, files: list[Path], model_dir: Path, cache_dir: Path) -> Corpus:
    """Training and held-out windows of `--data`, as the recipe wants them; tokenised once, into `cache_dir`."""
    spec = wanted.train
    assert spec is not None and spec.window_tokens is not None
    if not files:
        raise DataError(f"method {wanted.method.name} learns from text; give it with --data FILE ...")
    tokens.check_window_tokens(spec.window_tokens, model.stored_max_tokens(model_dir))
    tokenizer = model.load_tokenizer(model_dir)
    return load_corpus(files, tokenizer, spec, cache_dir)


def _prior(wanted: Recipe, corpus: Corpus, model_dir: Path, work: Path, base_digest: str, group: Group) -> MaskSet:
    """The masks of the recipe's [prior], from the file of an earlier process where there is one."""
    recipe, file = wanted.prior_recipe(), work / PRIOR_FILE
    assert recipe is not None
    if group.first and not file.exists():
        _sweep(recipe, corpus, model_dir, work / "prior", base_digest, group.device).save(file)
        gc.collect()
    try:
        masks = MaskSet.load(file)
    except FormatError as error:
        raise FormatError(f"{error}; delete it to have it made again") from None
    if (masks.base_digest, masks.recipe_digest) != (base_digest, recipe.digest()):
        raise FormatError(f"{file}: made for another model or by another recipe; delete it to have it made again")
    return masks


def _sweep(recipe: Recipe, corpus: Corpus, model_dir: Path, work: Path, base_digest: str, device: str) -> MaskSet:
    """Sweep a throw-away copy of the model."""
    limit = model.stored_max_tokens(model_dir)
    windows_ST = _calibration(recipe, corpus, limit) if recipe.local_method().needs_data else None
    with display.bar() as bar:
        task = bar.add_task("loading", total=None, note="")
        loaded = model.load(model_dir)
        show = display.sweep_progress(bar, task, "prior: ")
        _, blocks = sweep(loaded, recipe, windows_ST, work, base_digest, device, show)
    return blocks.mask_set(base_digest, recipe.digest())


def _calibration(recipe: Recipe, corpus: Corpus, limit: int | None) -> Tensor:
    """Windows `[S, T]` for the prior, cut from what is trained on; every file in turn."""
    section = recipe.calibration
    assert section.window_tokens is not None
    tokens.check_window_tokens(section.window_tokens, limit)
    generator = torch.Generator().manual_seed(section.seed)
    windows = []
    for sample in range(section.samples):
        ids = corpus.files[sample % len(corpus.files)].flatten()
        starts = len(ids) - section.window_tokens + 1
        if starts < 1:
            raise DataError(
                f"a file has {len(ids)} tokens to train on, fewer than the {section.window_tokens} of a calibration "
                "window; give more text, or lower calibration.window_tokens"
            )
        start = int(torch.randint(starts, (), generator=generator))
        windows.append(ids[start : start + section.window_tokens])
    return torch.stack(windows).long()


def _session(
    wanted: Recipe,
    method: LearnedMethod,
    model_dir: Path,
    prior: MaskSet | None,
    group: Group,
    checkpointed: bool = False,
) -> tuple[Session, list[str]]:
    """Load the model and replace its layers; and the names of the linear layers that stay as they are.

    What is trained is float32; frozen weights stay as they are stored, unless the run is to compute in float32. What
    would stand in the way of writing the result is said here, before the first step.
    """
    assert wanted.train is not None
    in_float32 = method.trains_weights or wanted.train.scope == "all" or wanted.train.dtype == "float32"
    device = "cpu" if group.shard else group.device  # sharding moves a block at a time
    loaded = model.load(model_dir, torch.float32 if in_float32 else "auto", device)
    plan = model.plan(loaded, wanted.pattern, wanted.ignore)
    targets = [(name, linear) for block in plan.targets for name, linear in block.items()]
    if method.result is Result.SPARSE:
        compressor.check_source(model_dir, wanted.pattern, [name for name, _ in targets], plan.ignored)
    if prior is not None:
        for name, linear in targets:
            if name not in prior.bitmasks or prior.mask(name).shape != linear.weight.shape:
                raise ModelError(f"the prior has no mask for {name} {tuple(linear.weight.shape)}; see [recipe] ignore")
    units = slicer.units(loaded) if method.result is Result.SLICED else {}
    mask = None if prior is None else prior.mask
    session = prepare(loaded, plan, units, method, wanted.train, mask, wanted.pattern, group, checkpointed)
    export.check(session, model_dir)
    return session, [*plan.ignored, *(name for name, _ in targets if name not in session.layers)]


def _header(
    wanted: Recipe, session: Session, corpus: Corpus, files: list[Path], label: str, digests: dict[str, Any]
) -> dict[str, Any]:
    """First line of the log."""
    return {
        "recipe": wanted.resolved(),
        "digests": digests,
        "model": label,
        "data": [file.name for file in files],
        "training_windows": sum(len(windows) for windows in corpus.files),
        "heldout_windows": len(corpus.heldout),
        "layers": {name: [layer.out_features, layer.in_features] for name, layer in session.layers.items()},
        "trained_parameters": sum(parameter.numel() for parameter in session.parameters),
        "reference": "start" if digests["prior"] is None else "prior",
        "torch": str(torch.__version__),
        "hardware": {
            "device": str(session.device),
            "name": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else platform.machine(),
            "processes": session.group.world,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        },
    }


def _write(args: argparse.Namespace, session: Session, dense: list[str], origin: Origin, extra: dict[str, Any]) -> None:
    """The result, by kind, and what a person should know about it."""
    result = session.method.result
    if result is Result.SPARSE:
        masks, written = export.write_sparse(session, origin, args.out, dense, extra)
        if args.masks_out is not None:
            masks.save(args.masks_out)
        display.print_compressed(args.out, written)
    elif result is Result.DENSE:
        display.print_dense(args.out, export.write_dense(session, origin, args.out, extra))
    else:
        display.print_shrunk(args.out, export.write_sliced(session, origin, args.out, extra))

"""What each `maskgen` verb does: put the parts together. What a person sees of it is in `display`."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from maskgen.cli import demo as demos
from maskgen.cli import display
from maskgen.core.checkpoint import SparseCheckpoint, is_sparse_checkpoint
from maskgen.core.config import SparseConfig
from maskgen.core.digest import digest_weights
from maskgen.core.errors import DataError, ModelError, OutputExistsError, SparseError
from maskgen.core.files import read_json, write_json
from maskgen.core.mask import MaskSet
from maskgen.core.packed import StoredLayer
from maskgen.core.pattern import NMPattern
from maskgen.core.perplexity import Protocol
from maskgen.data import tokens
from maskgen.export import compress as compressor
from maskgen.export import quantise as quantiser
from maskgen.export.inspect import inspect
from maskgen.hf import evaluate, model
from maskgen.methods import LocalMethod
from maskgen.numerics.memory import peak_rss_bytes
from maskgen.recipes import recipe
from maskgen.recipes.recipe import RECIPE_FILE, Recipe
from maskgen.sweep import permute as permuter
from maskgen.sweep.arrange import Arrangement
from maskgen.sweep.driver import SweepReport, sweep
from maskgen.sweep.workdir import WorkDir, finish, is_left_over, work_dir
from maskgen.train.run import check_prior, given_prior, learn, refuse_training_flags


def run(args: argparse.Namespace) -> None:
    """Recipe + dense model + text -> checkpoint."""
    model.quiet()
    wanted = recipe.load(args.recipe, args.overrides)
    work = work_dir(args.out)
    is_cleaning_up = args.out.exists() and is_left_over(work) and not args.keep_work
    for path in (args.out, args.masks_out):
        if path is not None and path.exists() and not is_cleaning_up:
            raise OutputExistsError(f"{path} exists; remove it or choose another output")
    device, model_dir = _device(args.device), _dense(args.model)
    wanted = wanted.for_context(model.stored_max_tokens(model_dir))
    if is_cleaning_up:
        _clean_up(args, wanted)
        return
    if isinstance(wanted.build_method(), LocalMethod):
        _prune(args, wanted, model_dir, device)
    elif not learn(args, wanted, model_dir, _label(args.model, model_dir), device):
        return
    finish(work, args.keep_work)


def _clean_up(args: argparse.Namespace, wanted: Recipe) -> None:
    """A run was killed when its result was there, whole, and its work directory was not gone yet: do what was left."""
    made_with = args.out / RECIPE_FILE
    if not made_with.is_file() or read_json(made_with) != wanted.resolved():
        raise OutputExistsError(f"{args.out} exists, of another recipe; remove it or choose another output")
    if args.masks_out is not None and not args.masks_out.exists():
        SparseCheckpoint.open(args.out).mask_set().save(args.masks_out)
    finish(work_dir(args.out), keep=False)
    display.print_finished(args.out)


def _prune(args: argparse.Namespace, wanted: Recipe, model_dir: Path, device: str) -> None:
    """The one-shot branch of `run`."""
    refuse_training_flags(args, wanted)
    prior = given_prior(args.prior, wanted.local_method().uses_prior, wanted)
    base_digest = digest_weights(model_dir)
    check_prior(prior, args.prior, model_dir, base_digest)
    windows = _calibration(wanted, args.data, model_dir)
    report, work = _sweep(model_dir, wanted, windows, args.out, base_digest, device, prior)
    gc.collect()
    masks = work.mask_set(base_digest, wanted.digest())
    config = SparseConfig(
        pattern=wanted.pattern,
        targets=masks.names,
        ignored=tuple(report.ignored),
        mask_digest=masks.digest(),
        recipe_digest=wanted.digest(),
        base_model=_label(args.model, model_dir),
        base_digest=base_digest,
    )
    extra = {RECIPE_FILE: wanted.resolved()}
    written = compressor.compress(
        model_dir, config, lambda name, weight: StoredLayer(work.packed(name)), args.out, extra
    )
    if args.masks_out is not None:
        masks.save(args.masks_out)
    display.print_run(args.out, report, written, peak_rss_bytes())


def permute(args: argparse.Namespace) -> None:
    """Dense model + text -> the same function with its neurons in another order."""
    model.quiet()
    wanted = recipe.load(args.recipe, args.overrides)
    permuter.score_method(wanted)
    if args.out.exists():
        raise OutputExistsError(f"{args.out} exists; remove it or choose another output")
    device, model_dir = _device(args.device), _dense(args.model)
    wanted = wanted.for_context(model.stored_max_tokens(model_dir))
    windows = _calibration(wanted, args.data, model_dir)
    provenance = {
        "recipe": wanted.resolved(),
        "base_model": _label(args.model, model_dir),
        "base_digest": digest_weights(model_dir),
        "data_digest": None if windows is None else tokens.digest_tokens(windows),
    }
    arrangements = _arrange(model_dir, wanted, windows, device)
    gc.collect()
    report = permuter.write(model_dir, arrangements, args.out, provenance)
    display.print_permuted(args.out, report, wanted)


def compress(args: argparse.Namespace) -> None:
    """Dense model + masks -> sparse checkpoint."""
    model_dir, masks = model.resolve(args.model), compressor.load_masks(args.masks)
    ignored = tuple(name for name in model.linear_names(model_dir) if name not in masks.bitmasks)
    report = compressor.compress_masks(model_dir, masks, args.out, ignored, values=args.values)
    display.print_compressed(args.out, report)


def quantise(args: argparse.Namespace) -> None:
    """Sparse checkpoint with float values -> one with 8-bit values."""
    display.print_compressed(args.out, quantiser.quantise(args.model, args.out, args.values))


def decompress(args: argparse.Namespace) -> None:
    """Sparse checkpoint -> dense model with zeros, or with corrections folded in."""
    total_bytes = compressor.decompress(args.model, args.out)
    display.say(f"wrote {args.out}: {display.megabytes(total_bytes)}")
    if SparseCheckpoint.open(args.model, verify_bits=False).config.correction is not None:
        display.say("  its corrections are folded into the weights, so these are no longer sparse")


def inspect_model(args: argparse.Namespace) -> None:
    """Table or JSON of what a directory holds."""
    report = inspect(args.model, None if args.pattern is None else NMPattern.parse(args.pattern))
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        display.print_inspect(report)


def evaluate_model(args: argparse.Namespace) -> None:
    """Perplexity with its protocol."""
    model.quiet()
    protocol = Protocol(args.window, args.stride, args.bos, args.max_windows)
    device, model_dir = _device(args.device), model.resolve(args.model)
    tokenizer = model.load_tokenizer(model_dir)
    ids = tokens.read_tokens(args.data, tokenizer).tolist()
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    with display.bar() as bar:
        task = bar.add_task("loading", total=None, note="")
        loaded = model.load(model_dir, dtype, device)
        result = evaluate.perplexity(
            loaded,
            ids,
            protocol,
            tokenizer.bos_token_id,
            args.batch,
            lambda done, total: bar.update(task, description="scoring", completed=done, total=total),
        )
    used = str(next(loaded.parameters()).dtype).removeprefix("torch.")
    scored = sum(result.scored_tokens_per_window)
    display.say(f"perplexity {result.value:.4f}")
    display.say(f"  {len(result.nll_per_window)} windows, {scored} scored tokens, {protocol.describe()}, {used}")
    if args.json is not None:
        write_json(args.json, {"model": _label(args.model, model_dir), "dtype": used, **result.to_dict()})
    if args.windows_out is not None:
        write_json(args.windows_out, [asdict(window) for window in protocol.windows(ids, tokenizer.bos_token_id)])


def demo(args: argparse.Namespace) -> None:
    """A tiny trained model and text."""
    model.quiet()
    with display.bar() as bar:
        task = bar.add_task("training", total=None, note="")
        out = demos.build(
            args.out,
            lambda at: bar.update(
                task,
                completed=at.step,
                total=at.steps,
                note=f"loss {at.loss:.3f}  {at.tokens_per_s:,.0f} tokens/s  {at.remaining_s:.0f} s to go",
            ),
        )
    display.say(f"demo in {out}: model, calibration.txt, heldout.txt")
    display.say(f"next: maskgen run sparsegpt --model {out}/model --data {out}/calibration.txt --out {out}/sparse")


def report(args: argparse.Namespace) -> None:
    """One page about runs. What draws it is an optional extra, so it is imported here."""
    try:
        from maskgen.train.report.page import write
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise SparseError(
            f"maskgen report needs {package}, which is not installed: pip install 'sparse-serve[report]'"
        ) from None
    size_bytes = write(args.runs, args.out)
    display.say(f"wrote {args.out}: {display.megabytes(size_bytes)}; open it in a browser")


VERBS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "run": run,
    "permute": permute,
    "compress": compress,
    "quantise": quantise,
    "decompress": decompress,
    "inspect": inspect_model,
    "eval": evaluate_model,
    "demo": demo,
    "report": report,
}


def _dense(source: str) -> Path:
    model_dir = model.resolve(source)
    if is_sparse_checkpoint(model_dir):
        raise ModelError(f"{source}: already sparse; start from the dense model")
    return model_dir


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OSError(f"--device {name}: not usable here: {str(error).splitlines()[0]}") from None
    return name


def _calibration(wanted: Recipe, files: list[Path], model_dir: Path) -> torch.Tensor | None:
    if not wanted.local_method().needs_data:
        return None
    if not files:
        raise DataError(f"method {wanted.method.name} needs calibration text; give it with --data FILE ...")
    section = wanted.calibration
    assert section.window_tokens is not None
    tokens.check_window_tokens(section.window_tokens, model.stored_max_tokens(model_dir))
    generator = torch.Generator().manual_seed(section.seed)
    tokenizer = model.load_tokenizer(model_dir)
    return tokens.calibration_windows(files, tokenizer, section.samples, section.window_tokens, generator)


def _sweep(
    model_dir: Path,
    wanted: Recipe,
    windows: torch.Tensor | None,
    out: Path,
    base_digest: str,
    device: str,
    prior: MaskSet | None,
) -> tuple[SweepReport, WorkDir]:
    """Load and sweep. The dense model lives in here only: what follows needs the memory, and not the model.

    Some architectures refer to themselves, which only the collector undoes; the caller runs it.
    """
    masks, digest = (None, None) if prior is None else (prior.mask, prior.digest())
    with display.bar() as bar:
        task = bar.add_task("loading", total=None, note="")
        loaded = _load_checked(model_dir, wanted)
        show = display.sweep_progress(bar, task)
        return sweep(loaded, wanted, windows, work_dir(out), base_digest, device, show, masks, digest)


def _arrange(model_dir: Path, wanted: Recipe, windows: torch.Tensor | None, device: str) -> Mapping[str, Arrangement]:
    """Load and order. The dense model lives in here only, as in `_sweep`."""
    with display.bar() as bar:
        task = bar.add_task("loading", total=None, note="")
        loaded = _load_checked(model_dir, wanted)
        return permuter.find(loaded, wanted, windows, device, display.sweep_progress(bar, task))


def _load_checked(model_dir: Path, wanted: Recipe) -> torch.nn.Module:
    """The dense model, when nothing about its directory will be refused in the end."""
    loaded = model.load(model_dir)
    plan = model.plan(loaded, wanted.pattern, wanted.ignore)
    targets = [name for block in plan.targets for name in block]
    compressor.check_source(model_dir, wanted.pattern, targets, plan.ignored)
    return loaded


def _label(source: str, model_dir: Path) -> str:
    return compressor.model_label(model_dir) if Path(source).is_dir() else source

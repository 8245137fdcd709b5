"""What each `maskgen` verb does: put the parts together, show progress, say what to do next."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from maskgen import compress as compressor
from maskgen import data, evaluate, model, recipe
from maskgen import demo as demos
from maskgen.compress import CompressReport
from maskgen.core.checkpoint import WEIGHT_SUFFIX, is_sparse_checkpoint, read_headers
from maskgen.core.config import SparseConfig
from maskgen.core.digest import digest_weights
from maskgen.core.errors import DataError, ModelError, OutputExistsError
from maskgen.core.files import write_json
from maskgen.core.pattern import NMPattern
from maskgen.core.perplexity import Protocol
from maskgen.inspect import InspectReport, inspect
from maskgen.model import OUTSIDE
from maskgen.recipe import Recipe
from maskgen.sweep import Progress, SweepReport, sweep

RECIPE_FILE = "maskgen_recipe.json"
"""The resolved recipe, written beside the weights."""


def run(args: argparse.Namespace) -> None:
    """Recipe + dense model + text -> sparse checkpoint."""
    model.quiet()
    wanted = recipe.load(args.recipe, args.overrides)
    for path in (args.out, args.masks_out):
        if path is not None and path.exists():
            raise OutputExistsError(f"{path} exists; remove it or choose another output")
    device, model_dir = _device(args.device), model.resolve(args.model)
    if is_sparse_checkpoint(model_dir):
        raise ModelError(f"{args.model}: already sparse; start from the dense model")
    windows = _calibration(wanted, args.data, model_dir)
    base_digest = digest_weights(model_dir)
    work_dir = args.out.with_name(args.out.name + ".work")
    with _bar() as bar:
        task = bar.add_task("loading", total=None, note="")
        loaded = model.load(model_dir)
        _check_stored_names(model_dir, model.plan(loaded, wanted.pattern, wanted.ignore))
        report, work = sweep(loaded, wanted, windows, work_dir, base_digest, device, _sweep_progress(bar, task))
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
    written = compressor.compress(model_dir, config, lambda name, weight: work.packed(name), args.out, extra)
    if args.masks_out is not None:
        masks.save(args.masks_out)
    if not args.keep_work:
        work.remove()
    _print_run(args.out, report, written)


def compress(args: argparse.Namespace) -> None:
    """Dense model + masks -> sparse checkpoint."""
    model_dir, masks = model.resolve(args.model), compressor.load_masks(args.masks)
    ignored = tuple(name for name in model.linear_names(model_dir) if name not in masks.bitmasks)
    _print_compressed(args.out, compressor.compress_masks(model_dir, masks, args.out, ignored))


def decompress(args: argparse.Namespace) -> None:
    """Sparse checkpoint -> dense model with zeros."""
    total_bytes = compressor.decompress(args.model, args.out)
    _say(f"wrote {args.out}: {_megabytes(total_bytes)}")


def inspect_model(args: argparse.Namespace) -> None:
    """Table or JSON of what a directory holds."""
    report = inspect(args.model, None if args.pattern is None else NMPattern.parse(args.pattern))
    if args.json:
        Console().print_json(json.dumps(report.to_dict()))
    else:
        _print_inspect(report)


def evaluate_model(args: argparse.Namespace) -> None:
    """Perplexity with its protocol."""
    model.quiet()
    protocol = Protocol(args.window, args.stride, args.bos, args.max_windows)
    device, model_dir = _device(args.device), model.resolve(args.model)
    tokenizer = model.load_tokenizer(model_dir)
    ids = data.read_tokens(args.data, tokenizer).tolist()
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    with _bar() as bar:
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
    console = Console()
    console.print(f"perplexity {result.value:.4f}", highlight=False)
    console.print(
        f"  {len(result.nll_per_window)} windows, {scored} scored tokens, {protocol.describe()}, {used}",
        highlight=False,
    )
    if args.json is not None:
        write_json(args.json, {"model": _label(args.model, model_dir), "dtype": used, **result.to_dict()})
    if args.windows_out is not None:
        write_json(args.windows_out, [asdict(window) for window in protocol.windows(ids, tokenizer.bos_token_id)])


def demo(args: argparse.Namespace) -> None:
    """A tiny trained model and text."""
    model.quiet()
    with _bar() as bar:
        task = bar.add_task("training", total=None, note="")
        out = demos.build(
            args.out,
            lambda at: bar.update(
                task, completed=at.step, total=at.steps, note=f"loss {at.loss:.3f}  {at.remaining_s:.0f} s to go"
            ),
        )
    _say(f"demo in {out}: model, calibration.txt, heldout.txt")
    _say(f"next: maskgen run sparsegpt --model {out}/model --data {out}/calibration.txt --out {out}/sparse")


VERBS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "run": run,
    "compress": compress,
    "decompress": decompress,
    "inspect": inspect_model,
    "eval": evaluate_model,
    "demo": demo,
}


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OSError(f"--device {name}: not usable here: {str(error).splitlines()[0]}") from None
    return name


def _calibration(wanted: Recipe, files: list[Path], model_dir: Path) -> torch.Tensor | None:
    if not wanted.build_method().needs_data:
        return None
    if not files:
        raise DataError(f"method {wanted.method.name} needs calibration text; give it with --data FILE ...")
    section = wanted.calibration
    generator = torch.Generator().manual_seed(section.seed)
    tokenizer = model.load_tokenizer(model_dir)
    return data.calibration_windows(files, tokenizer, section.samples, section.window_tokens, generator)


def _check_stored_names(model_dir: Path, plan: model.Plan) -> None:
    """Layers are replaced in the files by name: find out before the work, not after it, that a name is not there."""
    stored = read_headers(model_dir)
    absent = [name for targets in plan.targets for name in targets if name + WEIGHT_SUFFIX not in stored]
    if absent:
        raise ModelError(
            f"{model_dir}: {absent[0]} is stored under another name; load the model with transformers, save_pretrained "
            "it, and prune the copy"
        )


def _label(source: str, model_dir: Path) -> str:
    return compressor.model_label(model_dir) if Path(source).is_dir() else source


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


@contextmanager
def _bar() -> Iterator[ProgressBar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def _sweep_progress(bar: ProgressBar, task: TaskID) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        bar.update(
            task,
            description=f"block {progress.block + 1}/{progress.blocks}",
            completed=progress.block,
            total=progress.blocks,
            note=f"{progress.what}  peak memory {_megabytes(progress.peak_rss_bytes)}",
        )

    return show


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def _print_run(out: Path, report: SweepReport, written: CompressReport) -> None:
    _say(
        f"pruned {len(report.targets)} layers, {report.million_weights:,.1f} M weights, in {report.total_s:.1f} s "
        f"({report.s_per_million_weights:.2f} s per M), peak memory {_megabytes(report.peak_rss_bytes)}"
    )
    if report.resumed_blocks:
        _say(f"  {report.resumed_blocks} blocks were finished by an earlier run")
    for name, why in report.ignored.items():
        if why != OUTSIDE:
            _say(f"  kept dense: {name}: {why}")
    _print_compressed(out, written)


def _print_compressed(out: Path, written: CompressReport) -> None:
    _say(
        f"wrote {out}: target weights {_megabytes(written.dense_target_bytes)} dense -> "
        f"{_megabytes(written.packed_target_bytes)} ({written.ratio:.2%}), directory {_megabytes(written.total_bytes)}"
    )
    _say(f"next: maskgen eval {out} --data FILE    or    sparse-serve serve {out}")


def _print_inspect(report: InspectReport) -> None:
    kind = "sparse checkpoint" if report.compressed else "dense model"
    _say(f"{report.path}: {kind}, pattern {report.pattern}")
    table = Table()
    for heading in ("layer", "stored"):
        table.add_column(heading, overflow="fold")
    for heading in ("shape", report.pattern, "zeros", "MB"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        table.add_row(
            Text(layer.name),
            layer.stored,
            f"{layer.out_features} x {layer.in_features}",
            "yes" if layer.follows else "no",
            f"{layer.zeros:.1%}",
            f"{layer.stored_bytes / 1e6:,.2f}",
        )
    Console().print(table)
    dense_bytes = sum(layer.dense_bytes for layer in report.layers)
    stored_bytes = sum(layer.stored_bytes for layer in report.layers)
    _say(
        f"{len(report.packed_layers)} of {len(report.layers)} matrices packed; {_megabytes(stored_bytes)} stored, "
        f"{_megabytes(dense_bytes)} if dense, {_megabytes(report.other_bytes)} of other tensors"
    )

"""What a learned run starts from: what it is given, or what the recipe's [prior] makes, once, in OUT.work.

That is a set of masks, or, for a method that takes the prior's weights too, a sparse checkpoint.

Legend: S = windows, T = tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.digest import digest_weights
from maskgen.core.errors import DataError, FormatError, ModelError, RecipeError
from maskgen.core.files import read_json, write_json
from maskgen.core.layout import LayerForm
from maskgen.core.mask import MaskSet
from maskgen.data.corpus import Corpus
from maskgen.export.allocation import Allocation, dense_layers, read_allocation, stored_allocation
from maskgen.export.compress import load_masks
from maskgen.hf import model
from maskgen.hf.planning import Plan, plan_of
from maskgen.methods import Method
from maskgen.methods.learned import LearnedMethod
from maskgen.recipes.recipe import Recipe
from maskgen.sweep import result
from maskgen.sweep.budget import Measuring, allocate, folder_of
from maskgen.sweep.driver import sweep
from maskgen.sweep.report import Progress
from maskgen.sweep.workdir import WorkDir
from maskgen.train.loop import Stage
from maskgen.train.parallel import Group
from maskgen.train.start import Start

PRIOR_FILE = "prior.safetensors"
"""In OUT.work: the masks that the recipe's [prior] made."""

START_FOLDER = "start"
"""In OUT.work: the masks and weights that the recipe's [prior] made, as a sparse checkpoint."""

_START_FILE = "start.json"
"""Beside it: the digest of its weights."""


def load_prior(path: Path | None, used: bool, wanted: Recipe) -> MaskSet | None:
    """The masks of a file or a sparse checkpoint, if there is one; `check_base` compares them with the model.

    Raises `RecipeError` if the method does not use masks to start from (`used`) or if their pattern is another one.
    """
    if path is None:
        return None
    if not used:
        method, advice = wanted.build_method(), ""
        if isinstance(method, LearnedMethod) and method.trains_weights:
            advice = ", or give a sparse checkpoint as `model` to go on from its weights and masks"
        elif "mask" in wanted.method.options:
            advice = ", or keep its masks and solve for the weights (method.mask=prior)"
        raise RecipeError(
            f"`prior` {path}: {wanted.method.name} with these options starts from no mask; leave it out{advice}"
        )
    masks = load_masks(path)
    if masks.pattern != wanted.pattern:
        raise RecipeError(f"`prior` {path}: its pattern is {masks.pattern}, the recipe's is {wanted.pattern}")
    return masks


def load_prior_weights(path: Path) -> SparseCheckpoint | None:
    """The sparse checkpoint in `path`, whose weights a run goes on from; None for a file of masks alone.

    Raises `RecipeError` for one with corrections, which its weights without them are not meant for.
    """
    if not path.is_dir():
        return None
    checkpoint = SparseCheckpoint.open(path)
    if checkpoint.config.correction is not None:
        raise RecipeError(
            f"`prior` {path}: has a correction beside its weights, which this method does not go on with; start from "
            "its masks alone (a file that --masks-out wrote), or from a checkpoint without one"
        )
    return checkpoint


def check_base(
    masks: MaskSet | None, model_dir: Path, base_digest: str, weights: SparseCheckpoint | None = None
) -> None:
    """Raise `FormatError` if masks to start from were made for other weights than the model's, and `RecipeError` if the
    checkpoint whose `weights` go with them differs from the model in more than these."""
    if masks is not None and masks.base_digest != base_digest:
        raise FormatError(
            f"`prior`: made for the weights {masks.base_digest}, but {model_dir} has {base_digest}; a mask is only "
            "valid for the weights it was chosen for: give that model, or a prior that was made from this one"
        )
    if weights is not None and (changed := Start(weights, model_dir).changed):
        raise RecipeError(
            f"`prior` {weights.path}: {len(changed)} tensors of layers that stay dense were trained too, such as "
            f"{next(iter(changed))}, and this method keeps the dense model's; start from its masks alone (a file that "
            "--masks-out wrote)"
        )


def make_prior(
    wanted: Recipe,
    corpus: Corpus,
    model_dir: Path,
    work: Path,
    base_digest: str,
    group: Group,
    progress: Callable[[Stage | Progress], None],
) -> tuple[MaskSet, Allocation | None]:
    """The masks of the recipe's [prior], made by process 0, or from the file of an earlier process; and how the
    recipe's budget was spent, if it has one.

    Text held out from training is held out here, too. Raises `FormatError` for a file that is damaged or not of this
    run, and whatever the sweep raises.
    """
    recipe, file = wanted.prior_recipe(), work / PRIOR_FILE
    assert recipe is not None
    if group.first and not file.exists():
        progress(Stage("prior"))
        _, swept, spent = _sweep(recipe, wanted, corpus, model_dir, work, base_digest, group.device, progress)
        for name, record in stored_allocation(spent).items():
            write_json(work / name, record)
        swept.mask_set(base_digest, recipe.digest()).save(file)
        del _, swept
        gc.collect()
    try:
        masks = MaskSet.load(file)
    except FormatError as error:
        raise FormatError(f"{error}; delete it to have it made again") from None
    if (masks.base_digest, masks.recipe_digest) != (base_digest, recipe.digest()):
        raise FormatError(f"{file}: made for another model or by another recipe; delete it to have it made again")
    return masks, read_allocation(work)


def given_start(path: Path, model_dir: Path, method: Method, name: str) -> Start:
    """The sparse checkpoint that a request gives as its prior, whose weights and masks the `method` of this `name`
    starts from.

    Raises `RecipeError` for a file of masks alone, `FormatError` for anything else that is none.
    """
    if not path.is_dir():
        load_masks(path)
        other = ""
        if isinstance(method, LearnedMethod):
            other = ", or train the dense weights under these masks with method.weights=dense and method.mask=prior"
        raise RecipeError(
            f"`prior` {path}: has masks alone, and {name} with these options starts from weights, too; give a sparse "
            f"checkpoint{other}"
        )
    return Start(SparseCheckpoint.open(path), model_dir, "prior")


def make_start(
    wanted: Recipe,
    corpus: Corpus,
    model_dir: Path,
    label: str,
    work: Path,
    base_digest: str,
    group: Group,
    progress: Callable[[Stage | Progress], None],
) -> Start:
    """The sparse checkpoint that the recipe's [prior] makes of the dense model, which is named `label`; like
    `make_prior`."""
    recipe, folder, note = wanted.prior_recipe(), work / START_FOLDER, work / _START_FILE
    assert recipe is not None
    if group.first and not folder.exists():
        progress(Stage("prior"))
        note.unlink(missing_ok=True)
        plan, swept, spent = _sweep(recipe, wanted, corpus, model_dir, work, base_digest, group.device, progress)
        result.write(swept, recipe, model_dir, label, base_digest, plan, folder, stored_allocation(spent))
        del plan, swept
        gc.collect()
    if group.first and not note.exists():
        write_json(note, {"weights": digest_weights(folder)})
    try:
        if group.first and read_json(note) != {"weights": digest_weights(folder)}:
            raise FormatError(f"{folder}: its weights are not those that were written, by the digest in {note}")
        checkpoint = SparseCheckpoint.open(folder, verify_bits=group.first)
    except (FormatError, ModelError) as error:
        raise FormatError(f"{error}; delete {folder} to have it made again") from None
    if (checkpoint.config.base_digest, checkpoint.config.recipe_digest) != (base_digest, recipe.digest()):
        raise FormatError(f"{folder}: made of another model or by another recipe; delete it to have it made again")
    return Start(checkpoint, model_dir)


def _sweep(
    recipe: Recipe,
    wanted: Recipe,
    corpus: Corpus,
    model_dir: Path,
    work: Path,
    base_digest: str,
    device: str,
    progress: Callable[[Progress], None],
) -> tuple[Plan, WorkDir, Allocation | None]:
    """Sweep a throw-away copy of the model by `recipe`, the [prior] of the `wanted` one, and leave every block's result
    in `work`; and how the budget was spent."""
    budget, form = wanted.budget, LayerForm(wanted.pattern, correction=wanted.build_method().correction)
    needs_text = budget is not None or recipe.local_method().needs_data
    windows_ST, folder, spent = _calibration(recipe, corpus) if needs_text else None, work / "prior", None
    if budget is not None and windows_ST is not None:
        bos_tokens = len(corpus.bos.ids)
        measuring = Measuring(recipe, budget, model_dir, base_digest, windows_ST, bos_tokens, device, folder, form)
        spent = allocate(measuring, progress)
        folder = folder_of(measuring, spent)
        gc.collect()
    loaded = model.load(model_dir)
    plan = plan_of(model_dir, recipe.pattern, recipe.ignore, loaded, dense_layers(spent))
    _, swept = sweep(loaded, plan, recipe, windows_ST, folder, base_digest, device, progress)
    return plan, swept, spent


def _calibration(recipe: Recipe, corpus: Corpus) -> Tensor:
    """Windows `[S, T]` for the prior, cut from what is trained on; every file in turn."""
    section = recipe.calibration
    assert section.window_tokens is not None
    text_tokens = corpus.bos.text_tokens(section.window_tokens)
    generator = torch.Generator().manual_seed(section.seed)
    windows = []
    for sample in range(section.samples):
        ids = corpus.files[sample % len(corpus.files)].flatten()
        starts = len(ids) - text_tokens + 1
        if starts < 1:
            raise DataError(
                f"a file has {len(ids)} tokens to train on, fewer than the {section.window_tokens} of a calibration "
                "window; give more text, or lower calibration.window_tokens"
            )
        start = int(torch.randint(starts, (), generator=generator))
        windows.append(ids[start : start + text_tokens])
    return corpus.bos.before(torch.stack(windows).long())

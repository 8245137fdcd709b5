"""The work directory of a sweep: one file per finished block, so that a killed run continues where it stopped.

`block-00012.safetensors` holds what is to be stored of every target layer of block 12 (`core.layout`: values, bitmask,
correction), and if the block was trained the losses of that, written under a temporary name, flushed and renamed: it is
whole or absent. `run.json` says which run the directory belongs to (`run_digest`); a different run raises an error
instead of mixing its blocks in.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from maskgen.core import layout
from maskgen.core.digest import digest_json
from maskgen.core.errors import FormatError, OutputExistsError
from maskgen.core.files import (
    is_temporary,
    open_tensors,
    read_json,
    save_tensors,
    temporary_sibling,
    write_json,
)
from maskgen.core.layout import LayerForm
from maskgen.core.mask import BITMASK_SUFFIX, MaskSet
from maskgen.core.packed import PackedTensor, StoredLayer
from maskgen.data.tokens import digest_tokens
from maskgen.numerics.products import multiplies_bfloat16
from maskgen.recipes.recipe import Recipe
from maskgen.sweep.reconstruct import Fitted

_FITTED = "fitted"
"""Tensor of a block that was trained: its losses before and after, float64 `[2]`."""

_RUN_FILE = "run.json"
_KEPT_FILE = "kept"
"""Marks the directory of a finished run whose caller asked to keep it, so that it is not taken for a clean-up that was
interrupted."""
TOKENS_FOLDER = "tokens"
"""Folder of `data.corpus`'s token cache. Its files are named by content, so it may exist before the run is known."""


def run_digest(
    recipe: Recipe, base_digest: str, windows: Tensor | None, device: str = "cpu", prior_digest: str | None = None
) -> str:
    """Digest of everything that decides a run's bits: recipe, dense weights, calibration tokens, prior masks, the kind
    of device and whether it multiplies in bfloat16, and the version of torch."""
    place = torch.device(device)
    arithmetic = {"device": place.type, "bfloat16": multiplies_bfloat16(place), "torch": str(torch.__version__)}
    data = None if windows is None else digest_tokens(windows)
    return digest_json(
        {"recipe": recipe.digest(), "base": base_digest, "data": data, "prior": prior_digest, **arithmetic}
    )


def work_dir(out_dir: Path) -> Path:
    """The work directory of a run that writes `out_dir`: its sibling `<name>.work`."""
    return out_dir.with_name(out_dir.name + ".work")


def finish(path: Path, keep: bool) -> None:
    """To be called when the run of this directory has its result: delete the directory, or with `keep` mark it as kept.

    It is renamed before it is deleted: if the process is killed meanwhile, what is left has a name no run uses.
    """
    if keep:
        write_json(path / _KEPT_FILE, {})
        return
    removed = _removal_name(path)
    shutil.rmtree(removed, ignore_errors=True)
    with suppress(OSError):  # the result is there; running the command again deletes the rest
        path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def is_left_over(path: Path) -> bool:
    """Whether `path`, the work directory of a run that has a result, should have been deleted, but its process was
    killed before."""
    return _removal_name(path).exists() or ((path / _RUN_FILE).is_file() and not (path / _KEPT_FILE).exists())


def _removal_name(path: Path) -> Path:
    return path.with_name(path.name + ".removing")


class WorkDir:
    """The finished blocks of one run, on disk. A new directory is made; one of the same run is continued.

    `run_digest` identifies the run, and `form` says what is stored of each layer. Raises `OutputExistsError` when
    `path` holds anything else.
    """

    def __init__(self, path: Path, run_digest: str, form: LayerForm) -> None:
        self.path, self.run_digest, self.form = Path(path), run_digest, form
        self._file_of: dict[str, Path] = {}
        reserve_for_run(self.path, run_digest)

    def has(self, block: int) -> bool:
        """Whether block number `block` is finished."""
        return self._path(block).is_file()

    def save(self, block: int, layers: Mapping[str, StoredLayer], fitted: Fitted | None = None) -> None:
        """Write block number `block`, atomically; `layers` are its target layers by module name."""
        tensors = {
            name + suffix: tensor.cpu().contiguous()
            for name, layer in layers.items()
            for suffix, tensor in layout.tensors(layer).items()
        }
        if fitted is not None:
            tensors[_FITTED] = torch.tensor([fitted.before, fitted.after], dtype=torch.float64)
        path = self._path(block)
        with temporary_sibling(path) as temporary:
            save_tensors(tensors, temporary, {"run": self.run_digest})
        self._file_of.update(dict.fromkeys(layers, path))

    def load(self, block: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, StoredLayer], Fitted | None]:
        """Read a finished block: its target layers by module name, and its losses if it was trained.

        `shapes` are the shapes `(O, I)` of the layers the block must hold. `FormatError` names a damaged file.
        """
        path = self._path(block)
        try:
            with open_tensors(path) as file:
                metadata, names = file.metadata() or {}, set(file.keys())
                losses = file.get_tensor(_FITTED).tolist() if _FITTED in names else None
        except FormatError:
            raise FormatError(f"{path}: damaged; delete this file to solve its block again") from None
        expected = {name + suffix for name in shapes for suffix in layout.suffixes(self.form)}
        if metadata.get("run") != self.run_digest or names - {_FITTED} != expected:
            raise FormatError(f"{path}: not written by this run; delete this file to solve its block again")
        self._file_of.update(dict.fromkeys(shapes, path))
        layers = {name: self.layer(name) for name in shapes}
        for name, layer in layers.items():
            layer.verify(f"{path}: {name}")
            if layer.packed.shape != tuple(shapes[name]):
                raise FormatError(f"{path}: {name}: shape {layer.packed.shape}, the model has {tuple(shapes[name])}")
        return layers, None if losses is None else Fitted(*losses)

    def layer(self, name: str) -> StoredLayer:
        """Read one layer of a block that was saved or loaded before; `KeyError` for any other name."""
        with open_tensors(self._file_of[name]) as file:
            return layout.read_layer(lambda suffix: file.get_tensor(name + suffix), self.form)

    def packed(self, name: str) -> PackedTensor:
        """The weight of one layer, as `layer`."""
        return self.layer(name).packed

    def mask_set(self, base_digest: str, recipe_digest: str) -> MaskSet:
        """The masks of every layer that was saved or loaded, with the digests of base weights and recipe."""
        bitmasks = {}
        for name, path in self._file_of.items():
            with open_tensors(path) as file:
                bitmasks[name] = file.get_tensor(name + BITMASK_SUFFIX)
        return MaskSet(self.form.pattern, bitmasks, base_digest, recipe_digest)

    def _path(self, block: int) -> Path:
        return self.path / f"block-{block:05d}.safetensors"


def reserve_for_run(path: Path, run_digest: str) -> None:
    """Make the work directory `path` for the run `run_digest`, or check that it is this run's.

    Raises `OutputExistsError` if it belongs to another run or is no work directory.
    """
    run_file = path / _RUN_FILE
    if not path.exists() or (path.is_dir() and _holds_only_leftovers(path)):
        write_json(run_file, {"run": run_digest})
    elif not run_file.is_file() or read_json(run_file).get("run") != run_digest:
        raise OutputExistsError(
            f"{path}: belongs to another run (different recipe, model, data, prior, kind of device or version of "
            "torch); delete it to start over, or choose another `out`"
        )


def _holds_only_leftovers(path: Path) -> bool:
    """Whether nothing but temporary files and the token cache is there: what a process killed at its start leaves."""
    return all(is_temporary(entry) or entry.name == TOKENS_FOLDER for entry in path.iterdir())

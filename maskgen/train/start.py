"""A sparse checkpoint that training goes on from: its weights, masks and correction in place of the dense model's.

The dense model that the checkpoint was made from is loaded first and copied for the teacher; then what the checkpoint
stores is put in. So the result names the dense model as its base, whatever it started from.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from maskgen.core.checkpoint import SparseCheckpoint, iterate_tensors, read_headers
from maskgen.core.correction import CorrectionConfig, LowRankCorrection, PooledCorrection
from maskgen.core.errors import DataError, FormatError, ModelError, RecipeError
from maskgen.core.mask import MaskSet
from maskgen.core.packed import Correction
from maskgen.core.pattern import NMPattern
from maskgen.export.compress import stored_modules
from maskgen.hf.planning import Plan


@dataclass(frozen=True)
class Start:
    """A verified sparse checkpoint, made from the dense model in `model_dir`. Weights come back in float32.

    `given_as` is the field of the request that names it, for messages: "model", and the dense model is the `teacher`;
    or "prior", and that is the `model`.
    """

    checkpoint: SparseCheckpoint
    model_dir: Path
    given_as: Literal["model", "prior"] = "model"

    @cached_property
    def masks(self) -> MaskSet:
        """The masks of its target layers."""
        return self.checkpoint.mask_set()

    def correction(self, name: str) -> Correction | None:
        """The correction of one target layer, in float32."""
        found = self.checkpoint.layer(name).correction
        return None if found is None else found.to(torch.float32)

    def check_form(self, pattern: NMPattern, correction: CorrectionConfig | None, targets: Collection[str]) -> None:
        """`RecipeError` unless a run with this `pattern` and these `targets` can go on from it.

        `correction` is what the run trains beside each layer: without one in the checkpoint, it starts at 0.
        """
        where, config = f"`{self.given_as}` {self.checkpoint.path}", self.checkpoint.config
        if config.pattern != pattern:
            raise RecipeError(
                f"{where}: its pattern is {config.pattern}, the recipe's is {pattern}; train it with its own "
                f"pattern (pattern={config.pattern})"
            )
        form = config.correction
        if form is not None and form != correction:
            advice = "start from the checkpoint that it was added to"
            if isinstance(form, PooledCorrection):
                advice = (
                    f"use adaptive_sparse_slorb with method.slorb_segment={form.segment} and "
                    f"method.slorb_pool={form.pool}"
                )
            elif isinstance(form, LowRankCorrection):
                advice = f"use adaptive_sparse or best-effort with method.rank={form.rank}, or {advice}"
            raise RecipeError(
                f"{where}: its layers have a correction, with which this method and these options do not go on; "
                f"{advice}"
            )
        for name in sorted(set(config.targets).symmetric_difference(targets)):
            ours, theirs = ("dense", "sparse") if name in config.targets else ("sparse", "dense")
            raise RecipeError(
                f"{where}: its layer {name} is {theirs}, and the recipe wants it {ours}; set `ignore` in the "
                "recipe to the layers that the checkpoint leaves dense"
            )

    def check_base(self, base_digest: str) -> None:
        """`FormatError` unless the dense model, whose weights have `base_digest`, is what it was made from."""
        config = self.checkpoint.config
        if config.base_digest != base_digest:
            dense = "teacher" if self.given_as == "model" else "model"
            raise FormatError(
                f"`{dense}` {self.model_dir}: its weights have digest {base_digest}, but {self.checkpoint.path} was "
                f"made from {config.base_model} with {config.base_digest}; give that model"
            )

    @cached_property
    def changed(self) -> dict[str, Tensor]:
        """Tensors of no target layer that differ from the dense model's (norms that were trained, say), by stored
        name. `FormatError` for one that the dense model has not, or has in another shape."""
        ours = {name for name, module in stored_modules(self.checkpoint) if module is None}
        found: dict[str, Tensor] = {}
        seen = set()
        for name, dense in iterate_tensors(read_headers(self.model_dir)):
            if name not in ours:
                continue
            seen.add(name)
            tensor = self.checkpoint.tensor(name)
            if tensor.shape != dense.shape:
                raise FormatError(
                    f"{self.checkpoint.path}: {name} has shape {tuple(tensor.shape)}, in the dense model "
                    f"{self.model_dir} {tuple(dense.shape)}; the checkpoint was not made from it"
                )
            if not torch.equal(tensor, dense):
                found[name] = tensor
        for name in sorted(ours - seen):
            raise FormatError(f"{self.checkpoint.path}: {name} is no tensor of the dense model {self.model_dir}")
        return found

    @torch.no_grad()
    def put_into(self, model: nn.Module, plan: Plan) -> None:
        """Give `model`, the dense one, what is stored of every target layer but its correction, and what is `changed`.

        Raises `DataError` for a weight of another shape, `ModelError` for a changed tensor that is not one of the
        model's.
        """
        for name, linear in (item for block in plan.targets for item in block.items()):
            packed = self.checkpoint.packed(name)
            if packed.shape != tuple(linear.weight.shape):
                raise DataError(
                    f"{self.checkpoint.path}: {name} is a weight {packed.shape}, the dense model's is "
                    f"{tuple(linear.weight.shape)}; the checkpoint was not made from it"
                )
            linear.weight.copy_(packed.unpack())
        places = {plan.stored.get(name, name): tensor for name, tensor in model.state_dict().items()}
        for name, tensor in self.changed.items():
            if name not in places:
                raise ModelError(
                    f"{self.checkpoint.path}: {name} differs from the dense model's, and the model keeps it in other "
                    "tensors, so training cannot go on from it"
                )
            places[name].copy_(tensor)

"""The correction y += S (X x) of a sparse layer inside vLLM: its parameters and their shards.

S is `[O, K]` and X `[K, I]`. X is stored (a low-rank correction, or a trained pool), or fixed: it then adds up segments
of the inputs. What a rank of a tensor-parallel group holds, and why the sum is right:

    outputs split (QKV, gate-up)   rows of S, all of X      Every rank sees all inputs, so its X x is whole.
    inputs split, X fixed          columns of S             A segment lies on one rank; the all-reduce of y that a
                                                            split weight needs anyway adds up over segments.
    inputs split, X stored         all of S, columns of X   S (sum_r X_r x_r) = sum_r S (X_r x_r): the same
                                                            all-reduce adds up over inputs.

With X fixed and inputs split, each rank must hold whole segments. Layers that vLLM fuses (Q, K and V; gate and up) have
one S of concatenated rows, and one stored X *for each part*: X is `[P * K, I]`, and part p's rows of S see part p's
X x only. The correction is added after the kernel's product, which has the bias.

A tensor that was never loaded must not pass as a correction of zero, so parameters start as NaN and NaN is refused.

Legend: T = tokens, O = out features, I = in features (per rank), K = columns of S, P = parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter, RowvLLMParameter

from maskgen.core.correction import CorrectionConfig, PooledCorrection
from maskgen.core.errors import FormatError
from sparse_serve.tuning.correction import CorrectionKernel

OUT, POOL = "correction_out", "correction_pool"

_KNOWN = (ReplicatedLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)
"""Exact types: a subclass may split its weights in a way that is wrong for S or X."""


class _PoolsOfParts(BasevLLMParameter):
    """X of every part of a fused layer, `[P * K, I]`: each part loads its own rows, whole on every rank."""

    def __init__(self, rows_per_part: int, **kwargs: Any) -> None:
        self._rows = rows_per_part
        super().__init__(**kwargs)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._load(loaded_weight, kwargs["shard_id"])

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._load(loaded_weight, kwargs["shard_id"])

    def _load(self, loaded_weight: Tensor, shard_id: str | int) -> None:
        start = self._shard_id_as_int(shard_id) * self._rows
        self.data[start : start + self._rows].copy_(loaded_weight)


class LayerCorrection:
    """The correction of one vLLM layer that stands for `parts` layers of the checkpoint."""

    def __init__(self, form: CorrectionConfig, prefix: str, parts: int) -> None:
        self.form, self.prefix, self.parts = form, prefix, parts
        self.rows: list[int] = []
        self.kernel: CorrectionKernel | None = None
        self.tensor_names = (OUT, POOL) if form.stores_pool else (OUT,)

    def create_weights(
        self,
        layer: Module,
        inputs_per_rank: int,
        rows_per_part: list[int],
        inputs: int,
        dtype: torch.dtype,
        weight_loader: Any,
    ) -> None:
        """Register S and a stored X. Raises `FormatError` naming the layer if it cannot be split over these ranks."""
        self._check(layer, rows_per_part)
        columns = self.form.columns(inputs, self.prefix)
        self.rows = rows_per_part if self.parts > 1 else [sum(rows_per_part)]
        splits_inputs = type(layer) is RowParallelLinear
        rows, loading = sum(self.rows), {"weight_loader": weight_loader}
        if isinstance(self.form, PooledCorrection) and not self.form.stores_pool:
            out = _nan(rows, self._whole_segments(self.form.segment, inputs_per_rank), dtype)
            layer.register_parameter(OUT, ModelWeightParameter(data=out, input_dim=1, output_dim=0, **loading))
            return
        out, pool = _nan(rows, columns, dtype), _nan(self.parts * columns, inputs_per_rank, dtype)
        if splits_inputs:
            layer.register_parameter(OUT, BasevLLMParameter(data=out, **loading))
            layer.register_parameter(POOL, RowvLLMParameter(data=pool, input_dim=1, **loading))
            return
        layer.register_parameter(OUT, ModelWeightParameter(data=out, input_dim=1, output_dim=0, **loading))
        parts_pool = (
            BasevLLMParameter(data=pool, **loading)
            if self.parts == 1
            else _PoolsOfParts(rows_per_part=columns, data=pool, **loading)
        )
        layer.register_parameter(POOL, parts_pool)

    def finish_loading(self, layer: Module) -> None:
        """Verify what was loaded and keep it as plain parameters, as the arithmetic wants them."""
        for name in self.tensor_names:
            tensor = layer.get_parameter(name).data
            if not torch.isfinite(tensor).all():
                raise FormatError(f"{self.prefix}.{name}: holds NaN or infinity, or was not loaded")
        loaded = {name: layer.get_parameter(name).data for name in self.tensor_names}
        out, pool = loaded[OUT], loaded.get(POOL)
        self.kernel = CorrectionKernel.of(self.form, self.rows, out, pool)
        for name, prepared in zip((OUT, POOL), self.kernel.prepare(out, pool), strict=True):
            if prepared is not None:
                delattr(layer, name)
                layer.register_parameter(name, Parameter(prepared, requires_grad=False))

    def add(self, layer: Module, x: Tensor, y: Tensor) -> Tensor:
        """y + S (X x): x `[T, I]`, y `[T, O]`."""
        assert self.kernel is not None
        return self.kernel.add(x, y, getattr(layer, OUT), getattr(layer, POOL, None))

    def _check(self, layer: Module, rows_per_part: list[int]) -> None:
        if type(layer) not in _KNOWN:
            raise FormatError(
                f"{self.prefix}: a correction cannot be served by vLLM's {type(layer).__name__}, only by "
                f"{', '.join(kind.__name__ for kind in _KNOWN)}"
            )
        if self.parts not in (1, len(rows_per_part)):
            raise FormatError(
                f"{self.prefix}: vLLM fuses {len(rows_per_part)} matrices, but the checkpoint has {self.parts}"
            )

    def _whole_segments(self, segment: int, inputs_per_rank: int) -> int:
        """How many segments of a fixed X a rank holds."""
        if inputs_per_rank % segment:
            raise FormatError(
                f"{self.prefix}: {inputs_per_rank} inputs per tensor-parallel rank are no multiple of the correction's "
                f"segment of {segment}; use fewer ranks"
            )
        return inputs_per_rank // segment


def _nan(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, columns), float("nan"), dtype=dtype)

"""N:M sparse linear layers inside vLLM.

`SparseNMLinearMethod` gives a layer that the checkpoint stores packed (`config` says which) `values` and `bitmask` (and
for codes `scale`) parameters instead of `weight`, hands them to a kernel once they are loaded, and runs that
kernel. The weights are never decompressed to a dense copy. What a checkpoint adds to the product of its sparse weight
is in `correction`.

Tensor parallelism needs no code here: values and bitmask keep dim 0 = out and dim 1 = in, so vLLM narrows them exactly
as it narrows a dense weight (in/tp must be a multiple of lcm(8, m)), and a scale goes with its row. Fused layers (QKV,
gate-up) concatenate along the outputs.

A bitmask with a wrong bit count (also what a tensor that was never loaded looks like) ends the start with an error.

Legend: T = tokens, O = out features, I = in features (per rank).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)

from maskgen.core.digest import digest_json
from maskgen.core.errors import FormatError
from maskgen.core.int4 import check_even, scale_shape
from maskgen.core.packed import PackedTensor
from maskgen.core.values import CODE_DTYPES, FLOAT, INT4, per_byte
from sparse_serve.kernels import LinearSpec
from sparse_serve.plugin.correction import LayerCorrection
from sparse_serve.plugin.dense import dense_layers
from sparse_serve.plugin.options import read_options
from sparse_serve.runtime import environment
from sparse_serve.runtime.startup_error import record_startup_error
from sparse_serve.tuning import parity, parity_file
from sparse_serve.tuning.dispatch import Bound
from sparse_serve.tuning.selection import Choice, choice_for

if TYPE_CHECKING:
    from sparse_serve.plugin.config import SparseNMConfig

logger = init_logger("vllm.sparse_serve")  # vLLM prints only loggers below its own name

_PLANS_KEY = "sparse_nm_plans"


@register_weight_loader_v2_supported_method
class SparseNMLinearMethod(LinearMethodBase):
    """One packed linear layer: creates its parameters, gives them to a kernel, runs it.

    `prefix` is vLLM's name of it, `stored` are the names of the checkpoint's layers that it consists of.
    """

    def __init__(self, config: SparseNMConfig, prefix: str, stored: Sequence[str]) -> None:
        self.config = config
        self.prefix = prefix
        self.stored = tuple(stored)
        self.vllm_config = get_current_vllm_config()
        self.options = read_options(self.vllm_config.additional_config)
        self.choice: Choice | None = None
        self.bound: Bound | None = None
        self.kernel_names: tuple[str, ...] = ()
        self.correction = (
            None if config.correction is None else LayerCorrection(config.correction, prefix, len(self.stored))
        )
        self.dtype = torch.float32
        self.dense_bytes = 0
        self.created_s = self.loaded_s = time.monotonic()  # parts of the start, which the server tells

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Parameters of the layer that stand for its weight: the kernels', and the correction's."""
        return self.kernel_names + (() if self.correction is None else self.correction.tensor_names)

    @record_startup_error()
    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register `values` `[O, I*n/m]`, `bitmask` uint8 `[O, I/8]` and what else there is; called by vLLM."""
        pattern, out_features = self.config.pattern, sum(output_partition_sizes)
        name, kept = f"{self.prefix} (per tensor-parallel rank)", pattern.kept_columns(input_size_per_partition)
        pattern.check_columns(input_size_per_partition, name)
        if self.config.values == INT4:
            check_even(kept, name)
            _check_whole_groups(name, self.config.group, input_size_per_partition, input_size, kept)
        self.dtype, loader = params_dtype, extra_weight_attrs["weight_loader"]
        shapes = {
            "values": (
                CODE_DTYPES.get(self.config.values, params_dtype),
                kept // per_byte(self.config.values),
            ),
            "bitmask": (torch.uint8, input_size_per_partition // 8),
        }
        for name, (dtype, columns) in shapes.items():
            # Zeros, not empty: a bitmask or scale that is never loaded must fail its check, not pass it by luck.
            data = torch.zeros(out_features, columns, dtype=dtype)
            layer.register_parameter(
                name, ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
            )
        if self.config.values != FLOAT:
            shape = scale_shape(out_features, kept, self.config.group)
            scale = torch.zeros(shape, dtype=torch.float32)  # whatever the model's dtype is
            layer.register_parameter(
                "scale",
                ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=loader)
                if self.config.group is None
                else GroupQuantScaleParameter(data=scale, input_dim=1, output_dim=0, weight_loader=loader),
            )
        if self.correction is not None:
            self.correction.create_weights(
                layer, input_size_per_partition, output_partition_sizes, input_size, params_dtype, loader
            )

    @record_startup_error()
    def process_weights_after_loading(self, layer: Module) -> None:
        """Verify what was loaded, choose kernels, and replace the stored form by their layouts."""
        self.config.check_all_attached()
        stored = {
            name: layer.get_parameter(name).data for name in ("values", "bitmask", "scale") if hasattr(layer, name)
        }
        packed = PackedTensor(stored["values"], stored["bitmask"], self.config.pattern, stored.get("scale"))
        packed.verify(self.prefix)
        device = packed.values.device.type
        rows, columns = packed.shape
        spec = LinearSpec(
            rows, columns, packed.pattern, self.dtype, device, packed.kind, packed.group, self.options.activations
        )
        choice = choice_for(spec, self.options.kernel, dense_layers(spec.device_type))
        tensors, self.bound = choice.plan.prepare(packed), choice.plan.bind()
        if environment.kernel_parity_folder() is not None:
            bias = getattr(layer, "bias", None)
            found = parity.compare(self.prefix, choice, self.bound, tensors, packed, bias)
            part = {"rank": vars(layer)["tp_rank"], "ranks": vars(layer)["tp_size"]}
            parity_file.write(replace(one, **part) for one in found)
        for name in stored:
            delattr(layer, name)
        for name, tensor in tensors.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        if self.correction is not None:
            self.correction.finish_loading(layer)
        corrected = None if self.correction is None else self.correction.kernel
        _add_to_compile_key(self.vllm_config, self.prefix, str(choice.plan), str(corrected))
        # vLLM's LoRA layers ask this attribute for the device, and call `apply` for the product
        layer.weight_packed = torch.empty(0, device=packed.values.device)
        self.choice, self.kernel_names, self.dense_bytes = choice, tuple(tensors), packed.dense_nbytes(self.dtype)
        self.loaded_s = time.monotonic()
        logger.info_once("sparse_nm: %s", str(choice))
        if choice.is_last_resort:
            logger.warning_once("sparse_nm: only the reference kernel serves this, slower than dense: %s", str(choice))
        if choice.slower:
            logger.warning_once("sparse_nm: slower than dense with %s tokens: %s", str(choice.slower), str(choice))

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[T, I] -> [T, O]`."""
        assert self.choice is not None and self.bound is not None
        tensors = {name: getattr(layer, name) for name in self.kernel_names}
        y = self.bound.linear(x, tensors, bias, self.choice.spec.out_features)
        return y if self.correction is None else self.correction.add(layer, x, y)


def _check_whole_groups(name: str, group: int | None, part: int, whole: int, kept: int) -> None:
    """Raise `FormatError` if the inputs of a layer are divided in the middle of the values that share a scale."""
    if group is not None and part != whole and kept % group:
        raise FormatError(
            f"{name}: {part} of {whole} inputs keep {kept} weights a row, no multiple of the {group} that share a "
            "scale; quantise with --group row, or serve it with a smaller --tensor-parallel-size"
        )


def _add_to_compile_key(vllm_config: Any, prefix: str, *constants: str) -> None:
    """Make what vLLM's compiled code holds as a constant, and outlives, a part of its key: plan and correction.

    vLLM computes that key from its configuration, after the model is loaded. Of what goes into the key only
    `additional_config` is for a plugin to fill, so they are added to it.
    """
    if isinstance(vllm_config.additional_config, dict):
        before = vllm_config.additional_config.get(_PLANS_KEY)
        vllm_config.additional_config[_PLANS_KEY] = digest_json([before, prefix, *constants])

"""The output layer in int8 on a CPU, where it is asked for.

Every token that is decoded reads all of it, and beside 2:4 layers with 4-bit values the output layer of a small model
with a large vocabulary is most of what is read. Weights are rounded to the nearest of 255 steps, with a scale for each
row. Inputs keep 16 bits (`kernels/csrc/dense_int8.cpp`): rounding them to int8, too, would cost ten times what the
weights' rounding does, and with few tokens reading the weight is what takes the time.

The weight that was loaded stays beside the codes, as an embedding that is tied to it needs it.

Legend: T = tokens, O = out features (the vocabulary, per rank), I = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from maskgen.core.errors import FormatError
from maskgen.core.values import INT8, to_codes
from sparse_serve.kernels import cpu
from sparse_serve.plugin.options import OPTIONS_KEY, Options
from sparse_serve.runtime.startup_error import record_startup_error

logger = init_logger("vllm.sparse_serve")  # vLLM prints only loggers below its own name


class Int8HeadMethod(UnquantizedEmbeddingMethod):
    """One output layer, `prefix` by vLLM's name, loaded as ever and multiplied in int8."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.tensors: tuple[Tensor, Tensor, Tensor] | None = None

    @record_startup_error()
    def process_weights_after_loading(self, layer: Module) -> None:
        """Round the weight. Raises `FormatError` where products of bytes cannot be had."""
        weight_OI = layer.get_parameter("weight").data
        if problem := _problem(weight_OI.device.type, self.prefix):
            raise FormatError(f"--additional-config {OPTIONS_KEY}: lm_head {INT8!r} {problem}; leave it out")
        codes_OI, scale_O = to_codes(weight_OI, INT8)
        form = codes_OI.new_empty((weight_OI.shape[0], 0, weight_OI.shape[1]))
        self.tensors = torch.ops.sparse_serve_cpu.pack_int8(codes_OI.contiguous()), form, scale_O.contiguous()
        logger.info_once("sparse_nm: %s %s in int8", self.prefix, str(list(weight_OI.shape)))

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[T, I] -> [T, O]`."""
        assert self.tensors is not None
        y_TO: Tensor = torch.ops.sparse_serve_cpu.dense_int8(x, *self.tensors, bias)
        return y_TO


def _problem(device_type: str, prefix: str) -> str | None:
    if device_type != "cpu":
        return f"is for CPUs, and {prefix} is on {device_type}"
    return f"cannot be had here: {lacking}" if (lacking := cpu.dense_int8_problem()) else None


def head_method(layer: Module, prefix: str, options: Options) -> Int8HeadMethod | None:
    """How an output layer is multiplied, if `layer` is one and the options have a say in it."""
    return Int8HeadMethod(prefix) if options.lm_head == INT8 and isinstance(layer, ParallelLMHead) else None

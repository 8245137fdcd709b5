"""The output layer in int8 on a CPU, where it is asked for.

Every token that is decoded reads all of it, and beside 2:4 layers with 4-bit values the output layer of a small model
with a large vocabulary is most of what is read. Weights are rounded to the nearest of 255 steps, with a scale for each
row, and multiplied by vLLM's W8A8 layer. That rounds the input of a token to 255 steps, too, which alone would cost ten
times what the weights' rounding does. So a token goes through it twice, in one call:

    y = W8A8(x) + W8A8(x - r(x)),    r(x) = s round(x / s),  s = max |x| / 127

which leaves 255 steps to what the first 255 left over. With few tokens reading the weight is what takes the time, and
it is read once.

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
from maskgen.core.values import INT8
from sparse_serve.plugin import quantised
from sparse_serve.plugin.options import OPTIONS_KEY, Options
from sparse_serve.runtime.startup_error import record_startup_error
from sparse_serve.tuning.measure import Linear

logger = init_logger("vllm.sparse_serve")  # vLLM prints only loggers below its own name


class Int8HeadMethod(UnquantizedEmbeddingMethod):
    """One output layer, `prefix` by vLLM's name, loaded as ever and multiplied in int8."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.product: Linear | None = None

    @record_startup_error()
    def process_weights_after_loading(self, layer: Module) -> None:
        """Round the weight. Raises `FormatError` on any device but a CPU."""
        weight_OI = layer.get_parameter("weight").data
        if weight_OI.device.type != "cpu":
            raise FormatError(
                f"--additional-config {OPTIONS_KEY}: lm_head {INT8!r} is for CPUs, and {self.prefix} is on "
                f"{weight_OI.device.type}; leave it out"
            )
        self.product = quantised.w8a8(weight_OI).copy()
        logger.info_once("sparse_nm: %s %s in int8", self.prefix, str(list(weight_OI.shape)))

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[T, I] -> [T, O]`."""
        assert self.product is not None
        left_over = (x - _rounded(x)).to(x.dtype)
        y_TO, more_TO = self.product(torch.cat([x, left_over])).chunk(2)
        y_TO = y_TO + more_TO + 0 * left_over.sum(1, keepdim=True)  # a code has no NaN
        return y_TO if bias is None else y_TO + bias


def _rounded(x: Tensor) -> Tensor:
    """What the codes of `[T, I]` stand for, in float32."""
    wide = x.float()
    step_T1 = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / step_T1).round() * step_T1


def head_method(layer: Module, prefix: str, options: Options) -> Int8HeadMethod | None:
    """How an output layer is multiplied, if `layer` is one and the options have a say in it."""
    return Int8HeadMethod(prefix) if options.lm_head == INT8 and isinstance(layer, ParallelLMHead) else None

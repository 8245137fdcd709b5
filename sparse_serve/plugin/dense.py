"""The dense linear layer that stock vLLM would run in a sparse one's place: what a kernel has to beat.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_serve.tuning.measure import Linear, MakeDense, torch_dense


def stock_linear(weight_OI: Tensor) -> Linear:
    """x `[T, I]` -> y `[T, O]` as vLLM's unquantized layers compute it on a CPU, weights prepacked if it does that."""
    # importing vLLM takes seconds and changes the environment: on use
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    def run(x_TI: Tensor) -> Tensor:
        y_TO: Tensor = layer.cpu_linear(x_TI, layer.weight, None)
        return y_TO

    return run


def dense_layers(device_type: str) -> dict[str, MakeDense]:
    """What makes the dense layers that a sparse one is compared with, by name."""
    return {"torch": torch_dense, "vllm": stock_linear} if device_type == "cpu" else {"torch": torch_dense}

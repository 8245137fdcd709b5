"""LoRA adapters on a CPU: vLLM's own arithmetic, with two of its faults mended.

vLLM applies an adapter beside the product of a layer's weight, packed or dense, so nothing here is about sparsity. But
the CPU's version of vLLM 0.32 takes the index -1 of a token without an adapter for "the last adapter": requests for the
base model that share a step with an adapter's come out wrong. And it expects one row per request where logits are
computed for a whole prompt (`prompt_logprobs`), which ends the engine.

Legend: T = rows of a step (tokens; or requests, at the logits), O = out features, H = hidden size, R = rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class CpuAdapters(PunicaWrapperCPU):
    """Adds the adapters' products on a CPU. Rows without an adapter stay as they are."""

    def add_expand(self, y: Tensor, *args: Any, **kwargs: Any) -> None:
        """y `[T, O]` += products of a linear layer; see vLLM's."""
        with _only(self.token_lora_indices >= 0, y) as any_rows:
            if any_rows:
                super().add_expand(y, *args, **kwargs)

    def add_lora_embedding(self, y: Tensor, *args: Any, **kwargs: Any) -> None:
        """y `[T, H]` += products of an embedding; see vLLM's."""
        with _only(self.token_lora_indices >= 0, y) as any_rows:
            if any_rows:
                super().add_lora_embedding(y, *args, **kwargs)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """y `[T, O]` += products of the last layer with x `[T, H]`; see vLLM's."""
        indices = self._adapters_of(x)
        with _only(indices >= 0, y) as any_rows:
            if any_rows:
                product_TR = x.new_zeros((len(x), lora_b_stacked.size(-1)), dtype=torch.float32)
                bgmv_shrink(x, lora_a_stacked, product_TR, indices, scale)
                bgmv_expand(product_TR, lora_b_stacked, y, indices, add_inputs=True)

    def _adapters_of(self, x: Tensor) -> Tensor:
        """Index of the adapter of each row at the logits.

        The rows are one per request, gathered from the step's tokens, or, for `prompt_logprobs`, a slice of these.
        """
        is_slice = x.untyped_storage().nbytes() > x.nbytes
        if not is_slice and len(x) == len(self.sampler_indices):
            return self.sampler_indices
        first = x.storage_offset() // x.size(-1)
        return self.token_lora_indices[first : first + len(x)]


@contextmanager
def _only(rows: Tensor, y: Tensor) -> Iterator[bool]:
    """Let only these rows of y change, and yield whether there are any."""
    others = ~rows
    if others.all():
        yield False
        return
    before = y[others]
    yield True
    y[others] = before


def register() -> None:
    """Let vLLM use `CpuAdapters`, if this is its CPU build."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        name = f"{__name__}.{CpuAdapters.__name__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)

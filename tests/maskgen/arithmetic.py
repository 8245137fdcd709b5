"""What a processor is said to be fast in, and what matrices are multiplied in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def processor_has_bfloat16(monkeypatch: pytest.MonkeyPatch, avx: bool, amx: bool = False, arm: bool = False) -> None:
    """Whether the processor has instructions for bfloat16: AVX512-BF16, AMX or Arm's."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": arm})


class ProductDtypes(TorchDispatchMode):
    """Remembers the dtypes that matrices are multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
            self.seen.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))

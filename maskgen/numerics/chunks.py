"""How much of a tensor to work on at a time, where whole-tensor temporaries would cost too much memory."""

from __future__ import annotations

import torch

ELEMENTS = {"cpu": 1 << 18}
"""What stays in a core's cache."""

ELEMENTS_DEFAULT = 1 << 25
"""What fills an accelerator."""


def chunk_elements(device: torch.device) -> int:
    """Elements per chunk on `device`."""
    return ELEMENTS.get(device.type, ELEMENTS_DEFAULT)

"""Weights that hold nothing but zeros: what a download that broke off leaves in a file that already had its full size.

No training makes a whole matrix exactly zero, and a model with one answers all the same, wrongly. (There are matrices
that were never trained: those of blocks that are added to a model, such as LLaMA Pro's, are zero to begin with, and so
is the one row of RoBERTa's token types.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from maskgen.core.checkpoint import iterate_tensors
from maskgen.core.layout import VALUES_SUFFIX, WEIGHT_SUFFIX, TensorHeader

_FIRST = 4096


def zero_weights(headers: Mapping[str, TensorHeader]) -> list[str]:
    """Names of the matrices among these tensors, dense or the values of sparse ones, of which every number is 0.

    Of the others little more than the first page is read. Vectors do not count, nor matrices of one row or column:
    biases may be zero, and so may norms that are stored as their distance from 1 (Gemma's).
    """
    matrices = {
        name: header
        for name, header in headers.items()
        if sum(size > 1 for size in header.shape) > 1 and name.endswith((WEIGHT_SUFFIX, VALUES_SUFFIX))
    }
    return sorted(name for name, tensor in iterate_tensors(headers) if name in matrices and _is_zero(tensor))


def _is_zero(tensor: Tensor) -> bool:
    numbers = tensor.flatten()
    if numbers.itemsize == 1:  # codes, and floats of 8 bits, which torch does not compare
        numbers = numbers.view(torch.uint8)
    return not (numbers[:_FIRST].any() or numbers.any())

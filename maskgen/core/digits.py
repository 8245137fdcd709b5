"""Masks as digits: a compact form of N:M masks for mask files, of which one model may have many.

A group of m columns follows one of P = C(m, n) patterns (6 for 2:4), so its index in `NMPattern.candidates` is a digit
of base P, and k = floor(log_P 256) digits fit a byte. Three for 2:4: 0.667 bit a weight, where log2(6) / 4 = 0.646 is
the least possible. Groups are taken row-major over the whole matrix; the first of a byte is its least significant
digit; digits left over in the last byte are 0.

Legend: O = out features, I = in features, N = groups of the whole matrix, k = digits per byte, P = patterns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskgen.core.errors import FormatError
from maskgen.core.pattern import NMPattern


def digits_per_byte(pattern: NMPattern) -> int:
    """k: how many groups of `pattern` fit a byte; 0 where bits are as small, so that digits are not used."""
    count = pattern.candidate_count
    digits = max(k for k in range(9) if count**k <= 256)
    return digits if digits * pattern.m > 8 else 0


def pack_digits(mask_OI: Tensor, pattern: NMPattern) -> Tensor:
    """A legal bool mask `[O, I]` to uint8 `[ceil(N / k)]`, for patterns with `digits_per_byte`.

    A group that keeps the columns c_0 < c_1 < ... has sum_i C(m - 1 - c_i, n - i) candidates after it in the list: that
    is one table look-up per column, without a loop over groups, and every number fits uint8. Workspace: 8 bytes a
    group. Raises `PatternError` for a mask that does not follow the pattern, which has no digits.
    """
    pattern.check_mask(mask_OI)
    per_byte, n, m = digits_per_byte(pattern), pattern.n, pattern.m
    mask_mN = mask_OI.reshape(-1, m).T
    after_N = torch.zeros(mask_mN.shape[1], dtype=torch.uint8, device=mask_OI.device)
    kept_N = torch.zeros_like(after_N)
    for column in range(m):
        after = [math.comb(m - 1 - column, n - kept) if kept <= column else 0 for kept in range(n + 1)]
        table = torch.tensor(after, dtype=torch.uint8, device=mask_OI.device)
        after_N += table.index_select(0, kept_N.int()) * mask_mN[column]
        kept_N += mask_mN[column]
    digits_N = pattern.candidate_count - 1 - after_N
    digits_Bk = pad(digits_N, (0, -len(digits_N) % per_byte)).view(-1, per_byte)
    return (digits_Bk * _place_values(pattern, mask_OI.device)).sum(1, dtype=torch.uint8)


def unpack_digits(packed: Tensor, shape: tuple[int, int], pattern: NMPattern, name: str) -> Tensor:
    """The inverse of `pack_digits`: bool `[O, I]` of `shape`, legal by construction.

    Raises `FormatError` if the size is wrong, a byte is not k digits, or a digit left over is not 0. Workspace: 4 bytes
    a byte of `packed`.
    """
    per_byte, count = digits_per_byte(pattern), pattern.candidate_count
    groups = shape[0] * shape[1] // pattern.m
    size = -(-groups // per_byte)
    if packed.shape != (size,):
        raise FormatError(
            f"{name}: {packed.numel()} bytes of digits for a {pattern} mask {list(shape)}, expected {size} ({per_byte} "
            "groups a byte); the file is damaged or was not written by maskgen"
        )
    last = groups - per_byte * (size - 1)
    for what, values, digits in (("byte", packed, per_byte), ("last byte", packed[-1:], last)):
        largest = int(values.max()) if size else 0
        if largest >= count**digits:
            raise FormatError(
                f"{name}: a {what} of {largest}, but {digits} digits of base {count} end at {count**digits - 1}; the "
                "file is damaged or was not written by maskgen"
            )
    bytes_B1 = torch.arange(count**per_byte, device=packed.device)[:, None]
    digits_Bk = bytes_B1 // _place_values(pattern, packed.device) % count
    columns_BI = pattern.candidates().to(packed.device)[digits_Bk].flatten(1)
    return columns_BI.index_select(0, packed.int()).flatten()[: shape[0] * shape[1]].view(shape)


def _place_values(pattern: NMPattern, device: torch.device) -> Tensor:
    """P^0, P^1, ..., P^(k-1) as uint8."""
    powers = [pattern.candidate_count**place for place in range(digits_per_byte(pattern))]
    return torch.tensor(powers, dtype=torch.uint8, device=device)

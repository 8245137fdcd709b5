"""The arithmetic of a correction y + S (X x), however S and X lie in memory.

Both products are small, and so many calls to torch would take most of their time: for bfloat16 and a stored X, on CPUs
with AVX-512 and bfloat16, one call of ours makes them and the sum (`csrc/correction.cpp`). S and X then lie in blocks.

Legend: T = tokens, O = out features, I = in features, K = columns of S, P = parts of a fused layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from maskgen.core.correction import CorrectionConfig, PooledCorrection
from sparse_serve.kernels import cpu

_LANES, _PAIR, _TILE_PAIRS = 16, 2, 16


@dataclass(frozen=True)
class CorrectionKernel:
    """How the correction of one layer is added.

    `rows` are the outputs of each part, `inner` is K. With `in_blocks` one call of ours adds it.
    """

    form: CorrectionConfig
    rows: tuple[int, ...]
    inner: int
    in_blocks: bool

    @classmethod
    def of(cls, form: CorrectionConfig, rows: Sequence[int], out_OK: Tensor, pool: Tensor | None) -> CorrectionKernel:
        """For S `[O, K]` and X of each part, `[P * K, I]`, or None where X is fixed."""
        in_blocks = (
            pool is not None
            and pool.shape[1] % _PAIR == 0
            and pool.device.type == "cpu"
            and cpu.correction_problem(pool.dtype) is None
        )
        return cls(form, tuple(rows), out_OK.shape[1], in_blocks)

    def prepare(self, out_OK: Tensor, pool: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """S and X as `add` wants them: `[numbers]` and `[blocks, I / 2, 16, 2]` in blocks, or as they are."""
        if not self.in_blocks:
            return out_OK, pool
        assert pool is not None
        out = _blocks(out_OK, self.rows)
        beyond = -out.shape[1] % _TILE_PAIRS * _LANES * _PAIR  # where the tiles of the last block end
        return pad(out.flatten(), (0, beyond)), _blocks(pool, [self.inner] * len(self.rows))

    def add(self, x_TI: Tensor, y_TO: Tensor, out: Tensor, pool: Tensor | None) -> Tensor:
        """y + S (X x), `[T, O]`, with S and X as prepared."""
        if self.in_blocks:
            sum_TO: Tensor = torch.ops.sparse_serve_cpu.add_correction(
                y_TO, x_TI, pool, out, list(self.rows), self.inner
            )
            return sum_TO
        if pool is None:
            assert isinstance(self.form, PooledCorrection)
            return y_TO + linear(x_TI.unflatten(-1, (-1, self.form.segment)).sum(-1), out)
        inner = linear(x_TI, pool).chunk(len(self.rows), dim=-1)
        parts = zip(inner, out.split(list(self.rows)), strict=True)
        return y_TO + torch.cat([linear(z_TK, s_OK) for z_TK, s_OK in parts], dim=-1)


def _blocks(weight: Tensor, rows: Sequence[int]) -> Tensor:
    """`[blocks, ceil(columns / 2), 16, 2]` of a weight `[rows, columns]`; each part begins with a block of its own."""
    parts = [pad(part, (0, -part.shape[1] % _PAIR, 0, -len(part) % _LANES)) for part in weight.split(list(rows))]
    blocks = [part.unflatten(0, (-1, _LANES)).unflatten(-1, (-1, _PAIR)) for part in parts]
    return torch.cat(blocks).transpose(1, 2).contiguous()

"""What a user would pick in place of 2:4: the same model, dense, with integer weights. For `tests.bench.frontier`.

A peer is written as an ordinary dense directory whose weights are rounded to what its codes stand for, so that the same
`maskgen eval` scores it; `Scheme.stored_bytes` is what its own format would take. Weights of the linear layers in the
decoder blocks become signed integers with a scale for each row, or for each group of so many consecutive inputs of a
row; everything else stays as it is, and so do activations. Scales are symmetric (the largest entry of a group is the
largest code) and held in 16 bits.

`gptq` rounds column by column and lets the columns not yet rounded make up for the error (Frantar et al.,
arXiv 2210.17323, equations 2 and 3, in the Cholesky form of its algorithm 1), in the order of falling diagonal of the
Hessian, with the scales of the weights as they were ("static groups" of the libraries that write such files). Blocks
are done from the first to the last, each on what the rounded blocks before it put out.

Legend: O = out features, I = in features, G = groups of a row, S = windows, T = tokens.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from maskgen.core.companions import companion_files
from maskgen.core.pattern import NMPattern
from maskgen.data import tokens
from maskgen.hf import blocks, model
from maskgen.hf.planning import Plan, plan_of
from maskgen.methods.oneshot.sparsegpt import SparseGPT
from maskgen.numerics.statistics import Gram, damped_cholesky
from maskgen.sweep.observe import advance, observe
from sparse_serve.bench.quantised_model import Scheme, rounded, scales
from sparse_serve.plugin import quantised

_BATCH = 8
_DAMP = 0.01
_LAZY = 128
"""Columns after which the rest of the weight is changed."""

PEERS = {
    "int8 per row": Scheme(8),
    "int4 g128, rounded": Scheme(4, 128),
    "int4 g64, rounded": Scheme(4, 64),
    "int4 g128, GPTQ": Scheme(4, 128, gptq=True),
    "int4 g64, GPTQ": Scheme(4, 64, gptq=True),
}


@dataclass(frozen=True)
class Calibration:
    """For GPTQ: `samples` windows of `window_tokens` tokens of `texts`, cut as `maskgen run` cuts them."""

    texts: Sequence[Path]
    samples: int = 64
    window_tokens: int = 512
    seed: int = 0


def gptq(weight_OI: Tensor, stats: Gram, scheme: Scheme) -> Tensor:
    """The values of codes chosen column by column for the inputs that `stats` has seen; float32 `[O, I]`."""
    hessian_II = stats.sum_II * (2.0 / stats.tokens)
    dead_I = hessian_II.diagonal() == 0
    hessian_II.diagonal()[dead_I] = 1.0
    order_I = hessian_II.diagonal().argsort(descending=True)
    scale_OI = scales(weight_OI, scheme)[:, order_I]
    left_OI = weight_OI.masked_fill(dead_I, 0.0)[:, order_I].clone()
    factor_II = _inverse_factor(hessian_II[order_I][:, order_I])
    found_OI = torch.empty_like(left_OI)
    for start in range(0, left_OI.shape[1], _LAZY):
        columns = slice(start, min(start + _LAZY, left_OI.shape[1]))
        rest = slice(columns.stop, None)
        part_BO, error_BO = left_OI[:, columns].T.contiguous(), torch.empty_like(left_OI[:, columns].T)
        factor_BB = factor_II[columns, columns]
        for column, scale_O in enumerate(scale_OI[:, columns].T):
            value_O = rounded(part_BO[column], scale_O, scheme.bits)
            error_BO[column] = (part_BO[column] - value_O) / factor_BB[column, column]
            part_BO[column + 1 :].addr_(factor_BB[column, column + 1 :], error_BO[column], alpha=-1)
            part_BO[column] = value_O
        found_OI[:, columns] = part_BO.T
        left_OI[:, rest].addmm_(error_BO.T, factor_II[columns, rest], alpha=-1)
    return found_OI[:, order_I.argsort()]


def _inverse_factor(hessian_II: Tensor) -> Tensor:
    """Upper triangular U with (H + damping)^-1 = U^T U."""
    upper_II = damped_cholesky(hessian_II.flip(0, 1), _DAMP).flip(0, 1)
    eye_II = torch.eye(len(hessian_II))
    inverse_II: Tensor = torch.linalg.solve_triangular(upper_II, eye_II, upper=True)
    return inverse_II


def linears(model_dir: Path, loaded: nn.Module | None = None) -> Plan:
    """The layers that peers round: those that `maskgen run` makes 2:4."""
    return plan_of(model_dir, NMPattern(2, 4), model=loaded)


def stored_bytes(model_dir: Path, scheme: Scheme) -> int:
    """What these layers take with `scheme`."""
    return sum(scheme.stored_bytes(*linear.weight.shape) for linear in _each(linears(model_dir)))


def servers(model_dir: Path, names: Sequence[str]) -> list[str]:
    """Who serves these points in vLLM, as `sparse-serve bench serve --peers` names them: of int4, those whose groups
    are whole in every layer, where this processor has int4 layers."""
    inputs = {linear.in_features for linear in _each(linears(model_dir))}
    group = quantised.common_group(inputs)
    served = {PEERS[name].bits for name in names if PEERS[name].group in (None, group)}
    int4 = "w4a8" if quantised.has_w4a8() else "w4a16"
    found = [(8, "w8a8")] + [(4, int4)] * quantised.has_int4()
    return [server for bits, server in found if bits in served]


def points_of(server: str, names: Sequence[str]) -> list[str]:
    """The points whose codes a server such as `vLLM W4A16 g64` has: those that differ in their rounding alone take the
    same time. None for dense weights."""
    found = re.search(r"W(\d)A\d+(?: g(\d+))?", server)
    form = found and (int(found[1]), found[2] and int(found[2]))
    return [name for name in names if (PEERS[name].bits, PEERS[name].group) == form]


@torch.no_grad()
def write(model_dir: Path, out: Path, scheme: Scheme, calibration: Calibration) -> None:
    """Write `out`, a dense directory like `model_dir` in the same dtype, with the values of `scheme`'s codes."""
    loaded = model.load(model_dir)
    plan = linears(model_dir, loaded)
    if scheme.gptq:
        _round_with_gptq(loaded, plan, scheme, _windows(model_dir, calibration))
    else:
        for linear in _each(plan):
            weight_OI = linear.weight.float()
            linear.weight.data = rounded(weight_OI, scales(weight_OI, scheme), scheme.bits).to(linear.weight.dtype)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    loaded.save_pretrained(part)
    for file in companion_files(model_dir):
        shutil.copy(file, part)
    part.rename(out)


def _each(plan: Plan) -> Iterator[nn.Linear]:
    return (linear for targets in plan.targets for linear in targets.values())


def _windows(model_dir: Path, calibration: Calibration) -> Tensor:
    generator = torch.Generator().manual_seed(calibration.seed)
    tokenizer = model.load_tokenizer(model_dir)
    windows_ST: Tensor = tokens.calibration_windows(
        calibration.texts, tokenizer, calibration.samples, calibration.window_tokens, generator
    )
    return windows_ST


def _round_with_gptq(loaded: nn.Module, plan: Plan, scheme: Scheme, windows_ST: Tensor) -> None:
    device = torch.device("cpu")
    recording = blocks.record(loaded, plan.blocks, windows_ST.split(_BATCH))
    for index, (block, targets) in enumerate(zip(plan.blocks, plan.targets, strict=True)):
        dtypes = {name: linear.weight.dtype for name, linear in targets.items()}
        with blocks.upcast(block, device):
            inputs = observe(SparseGPT(), targets, block, index, recording, device)
            for name, linear in targets.items():
                value_OI = gptq(linear.weight.data, inputs.take(name), scheme)
                linear.weight.data = value_OI.to(dtypes[name]).float()
            advance(block, index, recording, device)

"""An order of columns in which an N:M pattern keeps more.

Which columns share a group is an accident of training. Four strong ones in one group lose two of them, four weak ones
keep two for nothing; dealt anew, so that strong and weak ones meet, the same pattern keeps more of the same scores.
Two stages, both of the RIA paper:

    deal      columns by falling total score, to the M positions of the groups, every other position in reverse, so that
              the strongest of one position meets the weakest of the next
    refine    position by position, its G columns are assigned to the G groups anew while the other positions stay: a
              linear assignment problem, solved exactly (among every `CHUNK` groups, since it takes G^3 operations)

What column c is worth in group g needs only the N-th best of the other columns there, t: of the two the group keeps the
larger, so over the rows o of the scores the gain is sum_o max(t_og, s_oc), and since max(a, b) = (a + b + |a - b|) / 2,
all G x G of them are one matrix of L1 distances.

Neither stage is allowed to lose: dealing is taken only where it beats the order that was there, and an assignment may
always leave everything in place.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
section 3.2.

Legend: O = rows of scores, I = columns, G = groups, M = columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskgen.core.pattern import NMPattern

PASSES = 4
"""Most passes over the positions."""

ENOUGH = 1e-4
"""Relative gain of a pass at which another one is not worth its time."""

CHUNK = 256
"""Groups that exchange columns with one another."""


@dataclass(frozen=True)
class Arrangement:
    """`order` `[I]`: which column stands in each place. The fraction of all scores that the pattern keeps, before and
    after; `after` is never less."""

    order: Tensor
    before: float
    after: float


@torch.no_grad()
def arrange(score_OI: Tensor, pattern: NMPattern) -> Arrangement:
    """An order of the columns in which `pattern` keeps more of the scores (float, finite, from 0 on).

    Raises `PatternError` for a number of columns that the pattern does not go with.
    """
    pattern.check_columns(score_OI.shape[1])
    score_OI = _of_order_one(score_OI)
    order_I = torch.arange(score_OI.shape[1], device=score_OI.device)
    before = best = _kept(score_OI, order_I, pattern)
    dealt_I = _deal(score_OI, pattern.m)
    if (kept := _kept(score_OI, dealt_I, pattern)) > best:
        order_I, best = dealt_I, kept
    for _ in range(PASSES):
        refined_I = order_I
        for position in range(pattern.m):
            refined_I = _assign(score_OI, refined_I, position, pattern)
        gain = _kept(score_OI, refined_I, pattern) - best
        if gain <= 0:
            break
        order_I, best = refined_I, best + gain
        if gain < ENOUGH * best:
            break
    whole = float(score_OI.sum(dtype=torch.float64)) or 1.0
    return Arrangement(order_I.cpu(), before / whole, best / whole)


def _of_order_one(score_OI: Tensor) -> Tensor:
    """Scores by a power of two, which rounds nothing, so that no sum of them overflows."""
    return torch.ldexp(score_OI, -torch.frexp(score_OI.amax()).exponent)


def _deal(score_OI: Tensor, m: int) -> Tensor:
    """Columns by falling total, dealt in a snake to the positions of the groups."""
    ranked_MG = score_OI.sum(0, dtype=torch.float64).argsort(descending=True, stable=True).view(m, -1).clone()
    ranked_MG[1::2] = ranked_MG[1::2].flip(1)
    return ranked_MG.T.reshape(-1)


def _kept(score_OI: Tensor, order_I: Tensor, pattern: NMPattern) -> float:
    """The sum of all scores that `pattern` keeps in this order."""
    score_OGM = score_OI[:, order_I].unflatten(1, (-1, pattern.m))
    return float(score_OGM.topk(pattern.n, dim=2).values.sum(dtype=torch.float64))


def _assign(score_OI: Tensor, order_I: Tensor, position: int, pattern: NMPattern) -> Tensor:
    """The best exchange of the columns of one position among the groups."""
    order_GM = order_I.view(-1, pattern.m)
    others_I = order_GM[:, [place for place in range(pattern.m) if place != position]].reshape(-1)
    rival_GO = score_OI[:, others_I].unflatten(1, (-1, pattern.m - 1)).topk(pattern.n, dim=2).values[..., -1].T
    own_GO = score_OI[:, order_GM[:, position]].T
    result_GM = order_GM.clone()
    chunks = -(-len(order_GM) // CHUNK)
    for start in range(chunks):
        mine = slice(start, None, chunks)  # every so many, because neighbours are alike once they are dealt
        gain_GG = _gain(rival_GO[mine].contiguous(), own_GO[mine].contiguous())
        chosen_G = torch.from_numpy(linear_sum_assignment(gain_GG.cpu().numpy(), maximize=True)[1])
        result_GM[mine, position] = order_GM[mine, position][chosen_G.to(order_I.device)]
    return result_GM.reshape(-1)


def _gain(rival_GO: Tensor, own_GO: Tensor) -> Tensor:
    """What the column of group c (second) would be worth in group g (first): sum_o max(t_og, s_oc)."""
    return (rival_GO.sum(1)[:, None] + own_GO.sum(1) + torch.cdist(rival_GO, own_GO, p=1)) / 2

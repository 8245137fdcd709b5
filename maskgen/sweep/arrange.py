"""Finds a permutation of columns with which an N:M pattern keeps a larger total score.

A pattern keeps the N best columns of each group of M neighbours. Four strong columns in one group lose two of them, and
four weak ones keep two; with strong and weak columns mixed, the same pattern keeps more. Two stages, both of the RIA
paper:

    start     columns sorted by total score fill position 0 of all groups, then position 1 in reverse order of groups,
              then position 2, and so on, so that the strongest of one position is beside the weakest of the next
    refine    for one position at a time, its G columns are assigned to the G groups while the other positions stay: a
              linear assignment problem, solved exactly (within sets of `GROUPS_PER_CHUNK` groups: the time grows as
              G^3)

The value of column c in group g depends only on t, the N-th best score of the other columns there: of the two the group
keeps the larger. Over the rows o of the scores that is sum_o max(t_og, s_oc), and since max(a, b) =
(a + b + |a - b|) / 2, all G x G values come from one matrix of L1 distances.

The result is never worse than the order given: the start is used only if it keeps more, and an assignment may leave
every column where it is.

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

MAX_PASSES = 4
"""Most passes over the positions."""

MIN_GAIN = 1e-4
"""Passes end when one gains less than this, relative to the sum that is kept."""

GROUPS_PER_CHUNK = 256
"""How many groups exchange columns in one assignment problem."""


@dataclass(frozen=True)
class Arrangement:
    """An order of columns, and what it gains.

    `order` `[I]` holds the old index of the column in each new place. `before` and `after` are the fractions of the sum
    of all scores that the pattern keeps in the old and in the new order; `after` is never less.
    """

    order: Tensor
    before: float
    after: float


@torch.no_grad()
def arrange(score_OI: Tensor, pattern: NMPattern) -> Arrangement:
    """Find an order of the columns of `score_OI` (float, finite, not negative) in which `pattern` keeps more of them.

    Raises `PatternError` for a number of columns that the pattern does not go with.
    """
    pattern.check_columns(score_OI.shape[1])
    score_OI = _scaled_to_one(score_OI)
    order_I = torch.arange(score_OI.shape[1], device=score_OI.device)
    before = best = _kept_sum(score_OI, order_I, pattern)
    start_I = _interleaved(score_OI, pattern.m)
    if (kept := _kept_sum(score_OI, start_I, pattern)) > best:
        order_I, best = start_I, kept
    for _ in range(MAX_PASSES):
        refined_I = order_I
        for position in range(pattern.m):
            refined_I = _assign(score_OI, refined_I, position, pattern)
        gain = _kept_sum(score_OI, refined_I, pattern) - best
        if gain <= 0:
            break
        order_I, best = refined_I, best + gain
        if gain < MIN_GAIN * best:
            break
    total = float(score_OI.sum(dtype=torch.float64)) or 1.0
    return Arrangement(order_I.cpu(), before / total, best / total)


def _scaled_to_one(score_OI: Tensor) -> Tensor:
    """The scores times a power of two, which rounds nothing, with the largest at most 1: no sum of them overflows."""
    return torch.ldexp(score_OI, -torch.frexp(score_OI.amax()).exponent)


def _interleaved(score_OI: Tensor, m: int) -> Tensor:
    """The first stage: columns by falling total score, position by position, every other position in reverse."""
    ranked_MG = score_OI.sum(0, dtype=torch.float64).argsort(descending=True, stable=True).view(m, -1).clone()
    ranked_MG[1::2] = ranked_MG[1::2].flip(1)
    return ranked_MG.T.reshape(-1)


def _kept_sum(score_OI: Tensor, order_I: Tensor, pattern: NMPattern) -> float:
    """The sum of all scores that `pattern` keeps in this order."""
    score_OGM = score_OI[:, order_I].unflatten(1, (-1, pattern.m))
    return float(score_OGM.topk(pattern.n, dim=2).values.sum(dtype=torch.float64))


def _assign(score_OI: Tensor, order_I: Tensor, position: int, pattern: NMPattern) -> Tensor:
    """The second stage for one position: the best assignment of its columns to the groups; the new order `[I]`."""
    order_GM = order_I.view(-1, pattern.m)
    others_I = order_GM[:, [place for place in range(pattern.m) if place != position]].reshape(-1)
    rival_GO = score_OI[:, others_I].unflatten(1, (-1, pattern.m - 1)).topk(pattern.n, dim=2).values[..., -1].T
    own_GO = score_OI[:, order_GM[:, position]].T
    result_GM = order_GM.clone()
    chunks = -(-len(order_GM) // GROUPS_PER_CHUNK)
    for start in range(chunks):
        members = slice(start, None, chunks)  # not neighbours: after the first stage these have like scores
        gain_GG = _gain(rival_GO[members].contiguous(), own_GO[members].contiguous())
        chosen_G = torch.from_numpy(linear_sum_assignment(gain_GG.cpu().numpy(), maximize=True)[1])
        result_GM[members, position] = order_GM[members, position][chosen_G.to(order_I.device)]
    return result_GM.reshape(-1)


def _gain(rival_GO: Tensor, own_GO: Tensor) -> Tensor:
    """`[G, G]`: row g, column c is the value in group g of the column that group c has now: sum_o max(t_og, s_oc)."""
    return (rival_GO.sum(1)[:, None] + own_GO.sum(1) + torch.cdist(rival_GO, own_GO, p=1)) / 2

"""The sparse layers of one checkpoint beside vLLM's quantised dense ones of the same shapes, on a CPU.

    for step in compare(survey):
        step.tokens, step.peer, step.sparse_s, step.peer_s

Each kind of layer, as it will be served, takes turns with the same layer as `plugin.quantised.peers` have it, on
random weights in several copies. As in `tuning.measure` the best time of each counts. A kind of layer that a peer does
not have is left out of both sides of that comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from sparse_serve.bench.survey import Survey
from sparse_serve.plugin import quantised
from sparse_serve.runtime.errors import KernelError, SettingsError
from sparse_serve.tuning.measure import BUDGET_S, POOL_BYTES, Linear
from sparse_serve.tuning.samples import random_dense_weight, random_input, random_weight
from sparse_serve.tuning.selection import Choice
from sparse_serve.tuning.timing import interleaved, torch_threads

TOKENS = (1, 16, 256)
_SPARSE = "sparse"
_MOST_COPIES = 16


@dataclass(frozen=True)
class PeerStep:
    """All layers of a step of `tokens` tokens that `peer` has too, one after the other: seconds of both.

    `layers` counts them.
    """

    tokens: int
    peer: str
    layers: int
    sparse_s: float
    peer_s: float


@dataclass
class PeerTimes:
    """Every step, and why a peer has no layer of some shape, by peer and shape."""

    steps: list[PeerStep] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def compare(survey: Survey, threads: int | None = None) -> PeerTimes:
    """Measure with `threads` (None: torch's number of now).

    Raises `SettingsError` where the layers are not served on a CPU.
    """
    device = next(iter(survey.kinds)).device_type
    if device != "cpu":
        raise SettingsError(f"--peers: vLLM's quantised layers are timed on a CPU, and this is {device}; leave it out")
    found, measured = PeerTimes(), []
    with torch_threads(threads), torch.inference_mode():
        for choice in survey.choices:
            measured.append((len(survey.kinds[choice.spec]), _measure(choice, found)))
    for tokens in TOKENS:
        for peer in quantised.peers():
            both = [(count, times[tokens]) for count, times in measured if peer in times[tokens]]
            if both:
                sparse_s, peer_s = (sum(count * each[name] for count, each in both) for name in (_SPARSE, peer))
                found.steps.append(PeerStep(tokens, peer, sum(count for count, _ in both), sparse_s, peer_s))
    return found


def _measure(choice: Choice, found: PeerTimes) -> Mapping[int, Mapping[str, float]]:
    """Seconds of one kind of layer, by number of tokens and candidate."""
    candidates = _candidates(choice, found)
    times: dict[int, dict[str, float]] = {}
    for tokens in TOKENS:
        x_TI = random_input(choice.spec, tokens)
        calls = {name: [partial(run, x_TI) for run in copies] for name, copies in candidates.items()}
        taken = interleaved(calls, BUDGET_S, least=5, most=300)
        times[tokens] = {name: min(taken.seconds[name]) for name in calls}
    return times


def _candidates(choice: Choice, found: PeerTimes) -> dict[str, Sequence[Linear]]:
    spec = choice.spec
    packed, bound = random_weight(spec), choice.plan.bind()
    count = min(_MOST_COPIES, max(2, -(-POOL_BYTES // packed.nbytes)))
    prepared = [choice.plan.prepare(packed) for _ in range(count)]
    candidates: dict[str, Sequence[Linear]] = {
        _SPARSE: [lambda x_TI, at=tensors: bound.linear(x_TI, at, None, spec.out_features) for tensors in prepared]  # type: ignore[misc]
    }
    weight_OI = random_dense_weight(spec)
    for name, make in quantised.peers().items():
        try:
            layer = make(weight_OI)
        except KernelError as error:
            found.refused[f"{name}, {spec.out_features}x{spec.in_features}"] = str(error)
            continue
        candidates[name] = [layer.copy() for _ in range(count)]
    return candidates

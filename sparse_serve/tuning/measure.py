"""Times of kernels and dense linear layers on one shape, at several numbers of tokens.

Weights are random (`samples`), and every candidate has several copies of them, more together than a last-level cache
holds. Candidates take turns (`timing`), and the best time of each counts: other work on the machine can only add to it,
and a choice that is kept must not depend on what else ran at that moment.

On a GPU all copies are called in a row, at least `GPU_CALLS` calls, and the GPU's own clock times the row. Up to
`GRAPH_TOKENS` tokens the row is one CUDA graph, as vLLM runs so few by default, so launching costs nothing; beyond it
calls are launched one by one, and the time of that counts.

A candidate that fails, or a kernel whose answer is wrong, is left out with its reason, and its traceback is logged; it
does not stop a server from starting.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from maskgen.core.errors import clip
from maskgen.core.packed import PackedTensor
from sparse_serve.kernels import Kernel, LinearSpec, multiplied, rounds_inputs
from sparse_serve.runtime import machine
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning.samples import dense_tile, random_dense_weight, random_input, random_weight
from sparse_serve.tuning.timing import Call, gpu_s, interleaved, wall_s

DENSE = "dense"
GRAPH_TOKENS = 512
POOL_BYTES = 128 << 20
BUDGET_S = 0.15
GPU_CALLS = 16
"""Calls in a row on a GPU, so that the start of the row does not count."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""By how much of the largest output an answer may differ from the exact one: roundings to 16 bits, or to TF32."""

_MOST_COPIES, _MOST_GPU_COPIES = 16, 256
"""On a GPU copies are cheap, and even those of a small layer have to be more than its L2 cache holds."""

logger = logging.getLogger(__name__)

_logged: set[tuple[str, str]] = set()
"""Candidates of this process whose failure was logged, with the reason: many layers meet the same one."""

Linear = Callable[[Tensor], Tensor]
"""x `[T, I]` -> y `[T, O]`, with one copy of the weights."""

MakeDense = Callable[[Tensor], Linear]
"""From a dense weight `[O, I]`."""


def torch_dense(weight_OI: Tensor) -> Linear:
    """torch's own linear layer."""
    return partial(torch.nn.functional.linear, weight=weight_OI)


@dataclass
class Measurements:
    """Seconds of one call, by number of tokens and candidate; and why candidates failed, by name.

    Of several dense layers only the fastest is in `seconds`, under the name `dense`.
    """

    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    spec: LinearSpec, kernels: Mapping[str, Kernel], tokens: Iterable[int], dense: Mapping[str, MakeDense]
) -> Measurements:
    """Time `kernels` and `dense` layers of the shape `spec`, with each number of `tokens`.

    A kernel that raises with any number of tokens is in `failed` and has no times at all. Raises `KernelError` if none
    of the dense layers can be run.
    """
    result = Measurements()
    with torch.inference_mode():
        _run(spec, kernels, tokens, dense, result)
    if spec.device_type == "cuda":
        torch.cuda.empty_cache()  # of what `_run` held until it returned
    for times in result.seconds.values():
        for name in result.failed:
            times.pop(name, None)
    return result


def _run(
    spec: LinearSpec,
    kernels: Mapping[str, Kernel],
    tokens: Iterable[int],
    dense: Mapping[str, MakeDense],
    result: Measurements,
) -> None:
    packed = random_weight(spec)
    candidates = _candidates(spec, packed, kernels, dense, result.failed)
    sparse = {name: candidates[name] for name in kernels if name in candidates}
    for count in tokens:
        _exclude_wrong(spec, packed, kernels, sparse, count, result.failed)
        times = _take_turns(spec, candidates, count, result.failed)
        peers = [times.pop(name) for name in labels(dense) if name in times]
        if not peers:
            raise _no_dense(spec, count, result.failed)
        result.seconds[count] = {DENSE: min(peers), **times}


def labels(dense: Iterable[str]) -> list[str]:
    """Names of dense layers among those of candidates, where kernels have names too."""
    return [f"{DENSE} {name}" for name in dense]


def _no_dense(spec: LinearSpec, tokens: int, failed: Mapping[str, str]) -> KernelError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    return KernelError(
        f"no dense layer [{spec.out_features}, {spec.in_features}] can be run here with {tokens} tokens to compare "
        f"kernels with ({reasons}); free memory, or name a kernel: --additional-config "
        """'{"sparse_nm": {"kernel": "NAME"}}' measures nothing"""
    )


def _take_turns(
    spec: LinearSpec, candidates: dict[str, list[Linear]], tokens: int, failed: dict[str, str]
) -> dict[str, float]:
    x_TI = random_input(spec, tokens)
    calls: dict[str, list[Call]] = {}
    for name, copies in candidates.items():
        if name not in failed:
            each = [partial(run, x_TI) for run in copies]
            _trying(name, failed, lambda name=name, each=each: calls.update({name: _ready(spec, each, tokens)}))  # type: ignore[misc]
    clock = gpu_s if spec.device_type == "cuda" else wall_s
    while calls:
        named = {name: [partial(_blaming, name, call) for call in copies] for name, copies in calls.items()}
        try:
            times = interleaved(named, BUDGET_S, least=5, most=300, clock=clock)
        except _Failed as late:
            _leave_out(late, failed)
            del calls[late.name]
            continue
        return {name: min(times.seconds[name]) / _calls_in_a_row(spec, len(candidates[name])) for name in calls}
    return {}


def _exclude_wrong(
    spec: LinearSpec,
    packed: PackedTensor,
    kernels: Mapping[str, Kernel],
    made: Mapping[str, list[Linear]],
    tokens: int,
    failed: dict[str, str],
) -> None:
    """Compare what kernels compute with the product of the rows that the weight repeats, in float32."""
    x_TI, tile_OI = random_input(spec, tokens), dense_tile(spec, packed)
    exact_TO = x_TI.float() @ tile_OI.T

    def check(name: str, linear: Linear) -> None:
        kernel, y_TO = kernels[name], linear(x_TI)
        tile_TO = multiplied(kernel, x_TI).float() @ tile_OI.T if rounds_inputs(kernel) else exact_TO
        if y_TO.shape != (tokens, spec.out_features):
            raise ValueError(f"its answer is {list(y_TO.shape)}, expected {[tokens, spec.out_features]}")
        wrong = [(part.float() - tile_TO[:, : part.shape[1]]).abs().max() for part in y_TO.split(len(tile_OI), dim=1)]
        worst = (torch.stack(wrong).max() / tile_TO.abs().max()).item()
        if not worst <= TOLERANCE[spec.dtype]:  # NaN is above it
            raise ValueError(f"its answer differs by {worst:.2g} of the largest output, with {tokens} tokens")

    for name, copies in made.items():
        if name not in failed:
            _trying(name, failed, partial(check, name, copies[0]))


def _candidates(
    spec: LinearSpec,
    packed: PackedTensor,
    kernels: Mapping[str, Kernel],
    dense: Mapping[str, MakeDense],
    failed: dict[str, str],
) -> dict[str, list[Linear]]:
    dense_OI = random_dense_weight(spec)
    count = _copies(spec, packed, len(kernels) + len(dense))
    made: dict[str, list[Linear]] = {}
    for name, make in zip(labels(dense), dense.values(), strict=True):

        def copy(name: str = name, make: MakeDense = make) -> None:
            made[name] = [make(dense_OI.clone()) for _ in range(count)]

        _trying(name, failed, copy)
    for name, kernel in kernels.items():

        def prepare(name: str = name, kernel: Kernel = kernel) -> None:
            prepared = [kernel.prepare(packed)]
            while len(prepared) < count:  # how a kernel places its tensors in a CPU's memory is its own matter
                more = _cloned(prepared[0]) if spec.device_type == "cuda" else kernel.prepare(packed)
                prepared.append(more)
            made[name] = [lambda x_TI, at=tensors: kernel.linear(x_TI, at, None) for tensors in prepared]  # type: ignore[misc]

        _trying(name, failed, prepare)
    return made


def _copies(spec: LinearSpec, packed: PackedTensor, candidates: int) -> int:
    """How many copies of a weight fill `POOL_BYTES`; fewer if those of all candidates took half of the free memory."""
    most = _MOST_GPU_COPIES if spec.device_type == "cuda" else _MOST_COPIES
    wanted = min(most, max(2, -(-POOL_BYTES // packed.nbytes)))
    free_bytes = torch.cuda.mem_get_info()[0] if spec.device_type == "cuda" else machine.available_bytes()
    return max(1, min(wanted, free_bytes // 2 // (candidates * packed.dense_nbytes(spec.dtype))))


def _ready(spec: LinearSpec, copies: list[Call], tokens: int) -> list[Call]:
    """Calls that can be timed: one for each copy, or on a GPU one for all of them."""
    if spec.device_type != "cuda":
        copies[0]()  # may compile, or fail
        return copies
    for call in copies:
        call()  # may compile, and choose an algorithm
    torch.cuda.synchronize()
    row = copies * (_calls_in_a_row(spec, len(copies)) // len(copies))
    return [_graph(row) if tokens <= GRAPH_TOKENS else partial(_in_a_row, row)]


def _calls_in_a_row(spec: LinearSpec, copies: int) -> int:
    """How many calls are timed as one: on a GPU every copy equally often, and at least `GPU_CALLS` in all."""
    return copies * -(-GPU_CALLS // copies) if spec.device_type == "cuda" else 1


def _in_a_row(copies: list[Call]) -> None:
    for call in copies:
        call()


def _graph(copies: list[Call]) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _in_a_row(copies)
    return graph.replay


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _trying(name: str, failed: dict[str, str], step: Callable[[], object]) -> None:
    """Run `step` for a candidate; if it raises, the candidate is in `failed`."""
    try:
        _blaming(name, step)
    except _Failed as error:
        _leave_out(error, failed)


def _leave_out(error: _Failed, failed: dict[str, str]) -> None:
    failed[error.name] = error.reason
    if (error.name, error.reason) not in _logged:
        _logged.add((error.name, error.reason))
        logger.warning("%s is left out: it %s", error.name, error.reason, exc_info=error.__cause__)


class _Failed(Exception):
    """A candidate's own exception, with its name."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self.reason = name, f"failed when it was measured: {type(error).__name__}: {clip(str(error))}"


def _blaming(name: str, step: Callable[[], object]) -> None:
    """Run `step`; what it raises becomes `_Failed`, which says whose step it was."""
    try:
        step()
    except Exception as error:
        raise _Failed(name, error) from error

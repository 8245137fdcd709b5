"""NVIDIA's cuSPARSELt through torch: the kernel for many tokens, where the sparse tensor core's products are the gain.

Layout. `torch._cslt_compress` turns a dense weight into one opaque blob (0.5625 of the dense bytes) whose inside may
change with every version of the library, so it is made at load and never stored. Compressing needs the dense weight
for a moment: one layer at a time, the peak is the compressed model plus one dense layer.

Values stored in 8 bits become bfloat16 numbers when the weight is prepared: code times scale, rounded, the weight that
`reference` multiplies by too. In memory they are then 0.5625 of the dense bytes and not 0.3125: they cost what bfloat16
values cost. The library's own 8-bit products would round activations to 8 bits as well. The codes themselves, exact in
bfloat16, and their scales as a vector alpha would round nothing, but the library does not take such a vector with
bfloat16 weights (0.8.0 on an H200: `cusparselt_alpha_per_row` in tests/bench/results/gpu-kernels--*.json). Scaling the
result afterwards is one more pass over it, one more rounding, and then the bias. `prepare` is not told the dtype of
the activations, so 8-bit values are not supported with float16 ones.

Product. The library computes weight times columns. The activations enter as a transposed view, which it reads in place,
and it writes the result transposed back, so nothing is copied, except that it wants a multiple of 8 tokens: others are
padded with zeros, and the answer is then the head of a longer one. The bias is added inside, one number per out
feature.

Algorithms. For each shape the library has dozens, and the first is often far from the best. `prepare` searches once for
every shape, at several numbers of tokens, by running them, and keeps what it found in the user's cache, for this GPU
and this version of the library. `linear` takes the algorithm of the bucket that its tokens fall in, and the library's
first where nothing was searched. The search runs without a bias and at the bucket's largest number of tokens; where the
library refuses what it found for another number or with a bias, its first algorithm is taken for that number of tokens
from then on, and a warning says so once. `linear` measures nothing, so it never stops the host and can be captured in a
CUDA graph.

Cost. torch builds the library's plan again in every call, 50 to 200 microseconds of the host's time, which a CUDA graph
hides; calls made one by one are slower than the GPU below some hundreds of tokens. `make gpu` measures what that costs
on a machine. To keep plans across calls the library would have to be called without torch.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskgen.core.packed import PackedTensor, unpack
from maskgen.core.values import FLOAT, from_codes
from sparse_serve.kernels import LinearSpec, capability_unsupported_reason, sparse_core_unsupported_reason
from sparse_serve.runtime import cache, machine

MULTIPLE, TOKENS_MULTIPLE = 16, 8
"""What the library wants both sides of a 16-bit weight, and the number of tokens, to be multiples of."""
BUCKETS = (16, 64, 256, 1024, 4096, 8192)
"""Numbers of tokens at which algorithms are searched; each serves up to its number, the last beyond it too."""
EXPANDED = torch.bfloat16
"""What 8-bit values become."""

BROKEN_FLOAT16 = "0.8.0"
"""Its search runs an illegal instruction with float16 on an H200 (tests/bench/results, 2026-11-26)."""

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16)
_LIBRARIES = ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")


class Problem(NamedTuple):
    """What an algorithm is chosen for."""

    device: torch.device
    dtype: torch.dtype
    out_features: int
    in_features: int
    bucket: int


class Algorithm(NamedTuple):
    """The library's number for it, and into how many parts, and how, it cuts the inner dimension."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


_KIND = "cusparselt-1"
_found: dict[Problem, Algorithm] = {}
"""Of this process. The numbers mean nothing to another GPU or another version of the library."""

_refused: set[tuple[Problem, int]] = set()
"""Padded numbers of tokens for which the library refused the algorithm found for their bucket."""


def unsupported_reason(spec: LinearSpec) -> str | None:
    """Only 2:4 in bfloat16 or float16, of a shape the library takes, on an NVIDIA GPU that has sparse tensor cores."""
    reason = sparse_core_unsupported_reason(spec, _DTYPES)
    if reason is not None:
        return reason
    if spec.values != FLOAT and spec.dtype != EXPANDED:
        return f"values {spec.values} are served with {EXPANDED} activations only, not with {spec.dtype}"
    if spec.out_features % MULTIPLE or spec.in_features % MULTIPLE:
        return f"a weight [{spec.out_features}, {spec.in_features}] is not of multiples of {MULTIPLE}"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    if spec.dtype == torch.float16 and any(map(_is_broken, _LIBRARIES)):
        return f"cuSPARSELt {BROKEN_FLOAT16} crashes the GPU's context with float16; install another version"
    return capability_unsupported_reason()


def _is_broken(package: str) -> bool:
    return machine.version(package) == BROKEN_FLOAT16


def prepare(packed: PackedTensor) -> dict[str, Tensor]:
    """The library's `blob`; and `form` `[O, 0, I]`, which carries O and I. Searches algorithms for a new shape."""
    values = packed.values if packed.scale is None else from_codes(packed.values, packed.scale).to(EXPANDED)
    blob = torch._cslt_compress(unpack(values, packed.bitmask))
    for bucket in BUCKETS:
        problem = Problem(blob.device, blob.dtype, *packed.shape, bucket)
        if problem not in _found:
            _found[problem] = _recall(problem) or _search(blob, problem)
    return {"blob": blob, "form": blob.new_empty((packed.shape[0], 0, packed.shape[1]))}


def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
    """`[..., I] -> [..., O]`."""
    y_TO: Tensor = cusparselt_linear(x_TI, tensors["blob"], tensors["form"], bias_O)
    return y_TO


def algorithm(blob: Tensor, form: Tensor, tokens: int) -> Algorithm:
    """The one found for the first bucket that holds `tokens`."""
    problem = _problem(blob, form, tokens)
    return Algorithm() if (problem, tokens) in _refused else _found.get(problem, Algorithm())


def _problem(blob: Tensor, form: Tensor, tokens: int) -> Problem:
    bucket = next((bucket for bucket in BUCKETS if tokens <= bucket), BUCKETS[-1])
    return Problem(blob.device, blob.dtype, form.shape[0], form.shape[2], bucket)


@torch.library.custom_op("sparse_serve::cusparselt_linear", mutates_args=())
def cusparselt_linear(x_TI: Tensor, blob: Tensor, form: Tensor, bias_O: Tensor | None) -> Tensor:
    """The custom op behind `linear`: padding and the choice of an algorithm are its own matter."""
    y_shape = (*x_TI.shape[:-1], form.shape[0])
    if x_TI.numel() == 0:
        return x_TI.new_empty(y_shape)
    return product(x_TI.reshape(-1, form.shape[2]), blob, form, bias_O).view(y_shape)


@cusparselt_linear.register_fake
def _fake(x_TI: Tensor, blob: Tensor, form: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], form.shape[0]))


def product(x_TI: Tensor, blob: Tensor, form: Tensor, bias_O: Tensor | None) -> Tensor:
    """One call of the library: contiguous `[T, O]`, T at least 1."""
    tokens = x_TI.shape[0]
    missing = -tokens % TOKENS_MULTIPLE
    x_TI = pad(x_TI, (0, 0, 0, missing)) if missing else x_TI.contiguous()
    if x_TI.data_ptr() % 16:
        x_TI = x_TI.clone()  # a slice; the library was told that every matrix starts at a multiple of 16 bytes
    padded = tokens + missing
    chosen = algorithm(blob, form, padded)
    try:
        return _multiply(x_TI, blob, bias_O, chosen)[:tokens]
    except RuntimeError as error:
        if chosen == Algorithm() or isinstance(error, torch.OutOfMemoryError):
            raise
        y_TO = _multiply(x_TI, blob, bias_O, Algorithm())[:tokens]
        problem = _problem(blob, form, padded)
        logger.warning(
            "cuSPARSELt refused %s for %s with %d tokens (%s); its first is used", chosen, problem, padded, error
        )
        _refused.add((problem, padded))
        return y_TO


def _multiply(x_TI: Tensor, blob: Tensor, bias_O: Tensor | None, chosen: Algorithm) -> Tensor:
    y_TO: Tensor = torch._cslt_sparse_mm(blob, x_TI.t(), bias=bias_O, transpose_result=True, **chosen._asdict())
    return y_TO


def _facts(problem: Problem) -> dict[str, Any]:
    """All that an algorithm's number depends on."""
    return {
        "device": torch.cuda.get_device_name(problem.device),
        "dtype": str(problem.dtype),
        "shape": [problem.out_features, problem.in_features, problem.bucket],
        "library": [torch.backends.cusparselt.version(), *map(machine.version, _LIBRARIES)],
        "torch": str(torch.__version__),
    }


def _recall(problem: Problem) -> Algorithm | None:
    """What an earlier process found; None if nothing, or if the file holds no algorithm."""
    stored = cache.recall(_KIND, _facts(problem))
    numbers = [stored[name] for name in Algorithm._fields if type(stored.get(name)) is int]
    if len(numbers) < len(Algorithm._fields) or numbers[0] < 0 or numbers[1] < 1:
        return None
    return Algorithm(*numbers)


def _search(blob: Tensor, problem: Problem) -> Algorithm:
    """Run every algorithm at the bucket's number of tokens, on random numbers; milliseconds to half a second."""
    random = torch.Generator(problem.device).manual_seed(0)
    shape = (problem.bucket, problem.in_features)
    x_TI = torch.randn(shape, generator=random, dtype=problem.dtype, device=problem.device)
    *found, _ = torch._C._cusparselt.mm_search(blob, x_TI.t(), None, None, None, True)  # type: ignore[attr-defined]
    cache.keep(_KIND, _facts(problem), Algorithm(*found)._asdict())
    return Algorithm(*found)

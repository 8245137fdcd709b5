"""Running one decoder block at a time, outside of the model it belongs to.

A model passes more to its blocks than the hidden states: masks, positions, rotary embeddings, per-layer variants of
them. These arguments are recorded, not computed here: the model runs once per batch with every block replaced by a stub
that notes its arguments and returns the hidden states as they are, and stops at the last block. Everything before the
blocks runs in the model's own dtype, as it will in production; what the blocks receive is then cast to float32.

The recorded arguments depend on the shape of a batch only, so one recording per batch size is enough for all batches; a
model whose blocks also receive something derived from the tokens is detected, and raises an error.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.core.errors import ModelError, NumericalError

COMPUTE_DTYPE = torch.float32

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block, without the hidden states, and the dtype of its matrix products."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    products: torch.dtype = COMPUTE_DTYPE


@dataclass(frozen=True)
class Recording:
    """The inputs of a block for every batch, and the arguments that every block is called with.

    `hidden[i]` is the float32 input `[B, T, D]` of batch i, on the CPU: that of the first block when recorded, and of a
    later one when the outputs of the blocks before it have been put there. `calls[B][j]` are the arguments of block j
    for a batch of B windows.
    """

    hidden: list[Tensor]
    calls: dict[int, list[BlockCall]]

    def call(self, batch: int, block: int) -> BlockCall:
        """The arguments of block number `block` for batch number `batch`."""
        return self.calls[self.hidden[batch].shape[0]][block]


class _LastBlockReached(Exception):
    """Ends a recording run before the head is computed."""


def record(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Tensor], products: torch.dtype = COMPUTE_DTYPE
) -> Recording:
    """Run the part of `model` before its `blocks` on batches of token ids `[B, T]`, and record what the blocks receive.

    `products` is the dtype in which `run` and `forward` will compute the matrix products of blocks. Raises `ModelError`
    for a model whose blocks cannot be run one by one, `NumericalError` if the embeddings are not finite.
    """
    as_output = _output_shape(model, blocks, batches[0][:1, :_PROBE_TOKENS])
    recording = Recording([], {})
    for ids_BT in batches:
        hidden_BTD, calls = _record_batch(model, blocks, ids_BT, as_output, products)
        known = recording.calls.setdefault(ids_BT.shape[0], calls)
        for index, (call, first) in enumerate(zip(calls, known, strict=True)):
            if not _same((call.args, call.kwargs), (first.args, first.kwargs)):
                raise ModelError(
                    f"{type(model).__name__}: block {index} receives an argument that depends on the tokens; running "
                    "its blocks one by one is not supported"
                )
        recording.hidden.append(hidden_BTD.to("cpu", COMPUTE_DTYPE))
        check_finite(recording.hidden[-1], "the embeddings")
    return recording


def run(block: nn.Module, hidden_BTD: Tensor, call: BlockCall, device: torch.device) -> Tensor:
    """The output `[B, T, D]` of a float32 block that is on `device`, for an input on the CPU; it is on the CPU, too."""
    return forward(block, hidden_BTD, call, device).to("cpu")


def forward(
    block: nn.Module, hidden_BTD: Tensor, call: BlockCall, device: torch.device, products: torch.dtype | None = None
) -> Tensor:
    """`run`, with the output left on `device`, and matrix products in another dtype than the call's, if one is given.

    What blocks add up is float32 in any case. Weights are cast anew at each use: they may have changed since.
    """
    products = products or call.products
    args, kwargs = (_cast(part, device) for part in (call.args, call.kwargs))
    with torch.autocast(device.type, products, enabled=products is not COMPUTE_DTYPE, cache_enabled=False):
        return _first(block(hidden_BTD.to(device), *args, **kwargs)).to(COMPUTE_DTYPE)


@contextlib.contextmanager
def upcast(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold a block in float32 on `device`; on exit its tensors return to their own dtypes and device.

    Parameters may be replaced meanwhile; they end up rounded to their own dtype. They are written back to their old
    storage: that may be a mapped file, whose pages would otherwise stay in memory beside the new tensors.
    """
    tensors = dict([*block.named_parameters(), *block.named_buffers()])
    originals = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = _cast(tensor.data, device)
        yield
    finally:
        for name, tensor in tensors.items():
            if tensor.data_ptr() != originals[name].data_ptr():
                originals[name].copy_(tensor.data)
            tensor.data = originals[name]


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise `NumericalError` if `tensor` holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NumericalError(f"{what}: NaN or infinity; check that the model itself runs and is not damaged")


def _output_shape(model: nn.Module, blocks: Sequence[nn.Module], ids_BT: Tensor) -> Callable[[Tensor], Any]:
    """How to make a block's output of hidden states: some architectures return a tensor, some a tuple."""
    outputs: list[Any] = []

    def run_and_stop(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs.append(output)
        raise _LastBlockReached

    handle = blocks[0].register_forward_hook(run_and_stop, with_kwargs=True)
    try:
        _forward(model, ids_BT)
    finally:
        handle.remove()
    (output,) = outputs
    if isinstance(output, tuple):
        return lambda hidden_BTD: (hidden_BTD, *output[1:])
    return lambda hidden_BTD: hidden_BTD


def _record_batch(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ids_BT: Tensor,
    as_output: Callable[[Tensor], Any],
    products: torch.dtype,
) -> tuple[Tensor, list[BlockCall]]:
    inputs: list[Tensor] = []
    calls: list[BlockCall] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        hidden_BTD = args[0] if args else kwargs.pop("hidden_states")
        inputs.append(hidden_BTD)
        calls.append(BlockCall(args[1:], kwargs, products))
        if len(calls) == len(blocks):
            raise _LastBlockReached
        return as_output(hidden_BTD)

    with replaced_forward(blocks, stub):
        _forward(model, ids_BT)
    return _first(inputs[0]), calls


@contextlib.contextmanager
def replaced_forward(blocks: Sequence[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    """Every block runs `stub` instead of itself, and is as it was afterwards."""
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = stub
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)  # Ctrl-C may have come before it was replaced
            if forward is not None:
                block.forward = forward


def _forward(model: nn.Module, ids_BT: Tensor) -> None:
    with contextlib.suppress(_LastBlockReached):
        model(input_ids=ids_BT, use_cache=False)
        raise ModelError(f"{type(model).__name__}: its forward pass does not run every decoder block once")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _cast(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, COMPUTE_DTYPE if value.is_floating_point() else value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, device) for key, item in value.items()}
    return value


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)

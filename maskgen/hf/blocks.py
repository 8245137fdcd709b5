"""Running one decoder block at a time, outside of the model it belongs to.

What a model passes to its blocks besides the hidden states (masks, positions, rotary embeddings, per-layer variants of
them) is its own business. So it is recorded, not rebuilt: the model runs once per batch with every block replaced by a
stub that notes its arguments and passes the hidden states on, and stops at the last block. Everything before the blocks
runs in the model's own dtype, as it will in production; what the blocks receive is then cast to float32.

The recorded arguments depend on the shape of a batch only, so one recording per batch size serves all batches; a model
whose blocks also receive something derived from the tokens is detected and refused.

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
class Call:
    """Arguments of one block call, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """What the first block receives, and how every block is called.

    `hidden[i]` is the float32 input `[B, T, D]` of batch i, on the CPU; `calls[B][j]` the call of block j.
    """

    hidden: list[Tensor]
    calls: dict[int, list[Call]]

    def call(self, batch: int, block: int) -> Call:
        """How block number `block` is called on batch number `batch`."""
        return self.calls[self.hidden[batch].shape[0]][block]


class _LastBlockReached(Exception):
    """Ends a recording run before the head is computed."""


def record(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Tensor]) -> Recording:
    """Run everything before the blocks on token batches `[B, T]`. Raises `ModelError`, `NumericalError`."""
    as_output = _output_shape(model, blocks, batches[0][:1, :_PROBE_TOKENS])
    recording = Recording([], {})
    for ids_BT in batches:
        hidden_BTD, calls = _record_batch(model, blocks, ids_BT, as_output)
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


def run(block: nn.Module, hidden_BTD: Tensor, call: Call, device: torch.device) -> Tensor:
    """Run a float32 block that is on `device`; hidden states come from the CPU and return to it."""
    args, kwargs = (_cast(part, device) for part in (call.args, call.kwargs))
    output = block(hidden_BTD.to(device), *args, **kwargs)
    return _first(output).to("cpu")


@contextlib.contextmanager
def upcast(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold a block in float32 on `device`; on exit its tensors return to their own dtypes and device.

    Parameters may be replaced meanwhile by values that their own dtype represents exactly. They are written back into
    the storage they came from: it may be a mapped file, whose pages would otherwise stay beside the new ones.
    """
    tensors = dict([*block.named_parameters(), *block.named_buffers()])
    homes = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = _cast(tensor.data, device)
        yield
    finally:
        for name, tensor in tensors.items():
            if tensor.data_ptr() != homes[name].data_ptr():
                homes[name].copy_(tensor.data)
            tensor.data = homes[name]


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise `NumericalError` if `tensor` holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NumericalError(f"{what}: NaN or infinity; check that the model itself runs and is not damaged")


def _output_shape(model: nn.Module, blocks: Sequence[nn.Module], ids_BT: Tensor) -> Callable[[Tensor], Any]:
    """How to dress hidden states as a block's output: some architectures return a tensor, some a tuple."""
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
    model: nn.Module, blocks: Sequence[nn.Module], ids_BT: Tensor, as_output: Callable[[Tensor], Any]
) -> tuple[Tensor, list[Call]]:
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        hidden_BTD = args[0] if args else kwargs.pop("hidden_states")
        inputs.append(hidden_BTD)
        calls.append(Call(args[1:], kwargs))
        if len(calls) == len(blocks):
            raise _LastBlockReached
        return as_output(hidden_BTD)

    with _replaced_forward(blocks, stub):
        _forward(model, ids_BT)
    return _first(inputs[0]), calls


@contextlib.contextmanager
def _replaced_forward(blocks: Sequence[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = stub
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
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

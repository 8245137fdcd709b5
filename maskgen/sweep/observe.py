"""Running a decoder block on all calibration windows, and what its linear layers receive meanwhile.

`advance` replaces the inputs of a block by its outputs, which are the inputs of the next one; `observe` also gives a
method the inputs of the block's linear layers. Both leave the block itself as it is.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskgen.core.errors import ModelError, NumericalError
from maskgen.hf import blocks
from maskgen.methods import Drift, LayerMethod
from maskgen.numerics.products import float32_sums

Receives = Callable[[str, Tensor], object]
"""Called with the name of a layer and the input that it receives, or the output."""


class InputStatistics:
    """A method's statistics of the inputs of some layers; layers that receive the very same tensor share them.

    Such layers (q, k and v; gate and up) are represented by the first of them, their leader.
    """

    def __init__(self, method: LayerMethod, products: torch.dtype) -> None:
        """`products` is the dtype that matrix products may be computed in."""
        self._method = method
        self._products = products
        self._stats: dict[str, Any] = {}
        self._leaders: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}

    def take(self, name: str) -> Any:
        """The statistics of layer `name`, to be taken once; they are freed when the last layer that shares them has.

        Raises `NumericalError` if the layer never received an input.
        """
        if name not in self._leaders:
            raise NumericalError(
                f"{name}: no calibration input ever reached this layer; give more text, or keep it dense with ignore"
            )
        leader = self._leaders.pop(name)
        return self._stats[leader] if leader in self._leaders.values() else self._stats.pop(leader)

    def end_of_batch(self) -> None:
        """Forget this batch's inputs. They are held until here so that `is` cannot meet a recycled object."""
        self._inputs.clear()

    def add(self, name: str, x: Tensor, drift: Drift | None = None) -> None:
        """Layer `name` receives `x` `[..., I]`. Raises `ModelError` for layers that share an input in some batches."""
        leader = next((other for other, seen in self._inputs.items() if seen is x), name)
        if self._leaders.setdefault(name, leader) != leader:
            raise ModelError(
                f"{name}: shares its input with {self._leaders[name]} in one batch and with {leader} in another; "
                "layers that are wired differently from batch to batch are not supported"
            )
        if leader == name:
            self._inputs[name] = x
            x_TI = x.reshape(-1, x.shape[-1]).float()
            with float32_sums(self._products):
                self._stats[name] = self._method.observe(self._stats.get(name), x_TI)
                if drift is not None:
                    self._stats[name] = self._method.observe_drift(self._stats[name], x_TI, drift)


@contextlib.contextmanager
def hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that were just put on are taken off at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def receiving(layers: Mapping[str, nn.Module], receives: Receives) -> contextlib.AbstractContextManager[None]:
    """`receives` is called with the name of each of `layers` and its input, while the block that holds them runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            receives(name, args[0])

        return before

    return hooked([layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()])


def putting_out(layers: Mapping[str, nn.Module], puts_out: Receives) -> contextlib.AbstractContextManager[None]:
    """`puts_out` is called with the name of each of `layers` and its output, while the block that holds them runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            puts_out(name, output)

        return after

    return hooked([layer.register_forward_hook(hook(name)) for name, layer in layers.items()])


def cloning(outputs: dict[str, Tensor]) -> Receives:
    """Keeps outputs as they are: some blocks add to them in place."""
    return lambda name, y: outputs.__setitem__(name, y.clone())


def observe(
    method: LayerMethod,
    layers: Mapping[str, nn.Linear],
    block: nn.Module,
    index: int,
    recording: blocks.Recording,
    device: torch.device,
    keep_outputs: bool = False,
) -> InputStatistics:
    """Run float32 block number `index` on every batch of `recording`; statistics of the inputs of `layers`, by name.

    With `keep_outputs`, each output takes the place of its input in `recording.hidden`; without it outputs are dropped.
    Raises `ModelError` for layers that share their input in some batches only, and `NumericalError` for outputs that
    are kept and not finite.
    """
    statistics = InputStatistics(method, recording.call(0, index).products)
    with receiving(layers, statistics.add):
        for batch, output_BTD in _outputs(block, index, recording, device):
            statistics.end_of_batch()
            if keep_outputs:
                _keep(output_BTD, batch, index, recording)
    return statistics


def advance(block: nn.Module, index: int, recording: blocks.Recording, device: torch.device) -> None:
    """Run float32 block number `index` on every batch; its outputs take the place of its inputs in `recording.hidden`.

    Raises `NumericalError` for outputs that are not finite.
    """
    for batch, output_BTD in _outputs(block, index, recording, device):
        _keep(output_BTD, batch, index, recording)


def _outputs(
    block: nn.Module, index: int, recording: blocks.Recording, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Number and output of each batch, run when it is asked for."""
    for batch, hidden_BTD in enumerate(recording.hidden):
        yield batch, blocks.run(block, hidden_BTD, recording.call(batch, index), device)


def _keep(output_BTD: Tensor, batch: int, index: int, recording: blocks.Recording) -> None:
    recording.hidden[batch] = output_BTD
    blocks.check_finite(output_BTD, f"output of block {index}")

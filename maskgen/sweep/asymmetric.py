"""Solving a block stage by stage beside the dense block, for methods with `is_asymmetric`.

    stage 1 of a Llama block   q, k, v        a stage: layers that are reached together
    stage 2                    o              each is observed when all before it are pruned
    stage 3                    gate, up
    stage 4                    down

Both blocks run on the same windows: the one at work on what the pruned blocks before it put out, a dense copy of it on
what the dense model has there. A run ends when it has reached the last layer of the stage. Experts of a mixture make
one stage by their kind, since no expert comes before another.

The writers of a block are the layers whose outputs are added to the residual stream: each is told what the stream in
front of it lacks, hidden + outputs of the writers before it, dense minus pruned.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskgen.hf import blocks
from maskgen.methods import Drift, LayerMethod
from maskgen.sweep.observe import InputStatistics, hooked, putting_out, receiving
from maskgen.sweep.reconstruct import Teacher

_ROUNDING = 1e-5
"""Most of a block's output, by L2 norm, that its input and its writers may leave unexplained."""

_ANY = "#"
"""Stands for the number of an expert."""


class _StageReached(Exception):
    """Ends the run of a block when all layers of a stage have received their input."""


@dataclass(frozen=True)
class BesideDense:
    """The float32 block at work, number `index`, with its `layers` by name, and the dense block beside it.

    `paths` say where in the block a layer is, `writers` which ones add to the residual stream, in their order.
    """

    method: LayerMethod
    block: nn.Module
    dense: nn.Module
    index: int
    layers: Mapping[str, nn.Linear]
    paths: Mapping[str, str]
    writers: Sequence[str]
    recording: blocks.Recording
    teacher: Teacher
    device: torch.device

    @classmethod
    def of(
        cls,
        method: LayerMethod,
        block: nn.Module,
        index: int,
        layers: Mapping[str, nn.Linear],
        recording: blocks.Recording,
        teacher: Teacher,
        device: torch.device,
    ) -> BesideDense:
        """Of a block that is dense as yet. The copy of it takes as much memory again."""
        paths = {id(module): path for path, module in block.named_modules()}
        names = {paths[id(layer)]: name for name, layer in layers.items()}
        paths_of = {name: path for path, name in names.items()}
        written = _writers(block, recording.hidden[0], recording.call(0, index), device)
        for path in written:  # one that is not pruned goes by its path
            paths_of.setdefault(names.get(path, path), path)
        writers = [names.get(path, path) for path in written]
        dense = copy.deepcopy(block)
        return cls(method, block, dense, index, layers, paths_of, writers, recording, teacher, device)

    def stages(self) -> list[list[str]]:
        """Names of the layers of each stage, in the order in which the first batch reaches them.

        Experts that it does not reach are with the others of their kind, other such layers at the end.
        """
        reached: dict[str, Tensor] = {}
        with receiving(self.layers, reached.setdefault):
            blocks.run(self.block, self.recording.hidden[0], self.recording.call(0, self.index), self.device)
        stage_of: dict[str, str] = {}
        for name, x in reached.items():
            leader = next(other for other, seen in reached.items() if seen is x)
            stage_of.setdefault(_kind(name), stage_of.get(_kind(leader), _kind(leader)))
        order = [*dict.fromkeys(stage_of.values()), ""]
        names = [[name for name in self.layers if stage_of.get(_kind(name), "") == stage] for stage in order]
        return [stage for stage in names if stage]

    def observe(self, names: Sequence[str]) -> InputStatistics:
        """Statistics of the inputs of these layers, which make one stage, in the block as it is now."""
        statistics = InputStatistics(self.method)
        for batch, hidden_BTD in enumerate(self.recording.hidden):
            dense_BTD = self.teacher.hidden[batch]
            wanted, wanted_out = self._reach(self.dense, names, batch, dense_BTD)
            found, found_out = self._reach(self.block, names, batch, hidden_BTD)
            for name, x in found.items():
                missing_BTD = None
                if name in self.writers and sum(other is x for other in found.values()) == 1:
                    missing_BTD = (dense_BTD - hidden_BTD).to(self.device)
                    for writer in self.writers[: self.writers.index(name)]:
                        missing_BTD += (wanted_out[writer] - found_out[writer]).reshape(missing_BTD.shape)
                tokens = hidden_BTD.shape[0] * hidden_BTD.shape[1]
                dense = None if _ANY in _kind(name) else wanted.get(name)  # experts order their tokens as they like
                statistics.add(name, x, _drift(x, dense, missing_BTD, tokens))
            statistics.end_of_batch()
        return statistics

    def _reach(
        self, block: nn.Module, names: Collection[str], batch: int, hidden_BTD: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run `block` on a batch until all layers of `names` have received an input, or to its end.

        Gives these inputs, and the outputs of writers that were there by then, by name.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def reach(name: str, x: Tensor) -> None:
            inputs[name] = x
            if len(inputs) == len(names):
                raise _StageReached

        layers = {name: block.get_submodule(self.paths[name]) for name in names}
        writers = {name: block.get_submodule(self.paths[name]) for name in self.writers}
        with receiving(layers, reach), putting_out(writers, _cloning(outputs)), contextlib.suppress(_StageReached):
            blocks.run(block, hidden_BTD, self.recording.call(batch, self.index), self.device)
        return inputs, outputs


def _drift(x: Tensor, dense: Tensor | None, missing_BTD: Tensor | None, tokens: int) -> Drift | None:
    """How far the input `x` `[..., I]` is from that in the `dense` model, if both are of all `tokens` of a batch."""
    if dense is None or dense.shape != x.shape or x.numel() != tokens * x.shape[-1]:
        return None
    difference_TI = (dense - x).reshape(tokens, -1)
    return Drift(difference_TI, None if missing_BTD is None else missing_BTD.reshape(tokens, -1))


def _writers(block: nn.Module, hidden_BTD: Tensor, call: blocks.BlockCall, device: torch.device) -> list[str]:
    """The linear layers whose outputs are added to the residual stream, by their path in the block, in order.

    They are the one or two that make the block's output when they are added to its input. Where no two do (the second
    half are experts), it is the one that makes what some other layer of the block, a norm, reads. None for blocks that
    are made in another way, with norms behind their layers for instance.
    """
    outputs: dict[str, Tensor] = {}
    linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    with putting_out(linears, _cloning(outputs)), _reading(block, hidden_BTD) as read:
        whole_BTD = blocks.forward(block, hidden_BTD, call, device)
    start_BTD = hidden_BTD.to(device)
    added = {path: y.reshape(start_BTD.shape) for path, y in outputs.items() if _fits(y, start_BTD)}

    def make(paths: Sequence[str], reached_BTD: Tensor) -> bool:
        rest_BTD = reached_BTD - start_BTD - sum(added[path] for path in paths)
        return float(rest_BTD.norm()) <= _ROUNDING * float(reached_BTD.norm() + start_BTD.norm())

    pairs = [*itertools.combinations(added, 1), *itertools.combinations(added, 2)]
    found = next((paths for paths in pairs if make(paths, whole_BTD)), None)
    if found is None:
        found = next(((path,) for path in added if any(make((path,), x_BTD) for x_BTD in read)), ())
    return list(found)


@contextlib.contextmanager
def _reading(block: nn.Module, hidden_BTD: Tensor) -> Iterator[list[Tensor]]:
    """What norms and the like of a block read while it runs, where that is as large as its input; filled meanwhile."""
    read: list[Tensor] = []

    def before(module: nn.Module, args: tuple[object, ...]) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.dim() and _fits(x, hidden_BTD):
            read.append(x.clone().reshape(hidden_BTD.shape))

    leaves = [module for module in block.modules() if not list(module.children()) and not isinstance(module, nn.Linear)]
    with hooked([leaf.register_forward_pre_hook(before) for leaf in leaves]):
        yield read


def _cloning(outputs: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
    """Keeps outputs as they are: some blocks add to them in place."""
    return lambda name, y: outputs.__setitem__(name, y.clone())


def _fits(y: Tensor, hidden_BTD: Tensor) -> bool:
    """Whether `y` is of the same tokens and as wide; some blocks put all tokens in one row of them."""
    return y.shape[-1] == hidden_BTD.shape[-1] and y.numel() == hidden_BTD.numel()


def _kind(name: str) -> str:
    """The name without the number of an expert: what all of them call this layer."""
    return re.sub(r"(?<=\bexperts\.)\d+(?=\.)", _ANY, name)

"""Run a one-shot method over a model block by block, in constant memory.

    embeddings -> [block 0] -> [block 1] -> ...        activations of all calibration windows stay in host memory
                  observe inputs of its linears (dense weights)
                  solve each linear, round to the stored dtype (or to codes), prune
                  run again with the pruned weights -> inputs of the next block

So the inputs of a block carry the errors that pruning the blocks before it really caused. Only the current block is in
float32 and on the device; the rest of the model keeps its dtype in host memory, so the peak is the dense model, one
block's float32 copy with its statistics, and the activations. Forward passes multiply in bfloat16 where the model is
stored in it and that is fast; sums, statistics and solving are float32. Linear layers that receive the very same tensor
(q, k and v; gate and up) share one set of statistics. For a method that needs no data, no forward pass is run. A
`BlockMethod` trains each block once it is pruned (`reconstruct`), and an asymmetric method solves it stage by stage
beside a copy of the dense block (`asymmetric`); the activations of the dense model are then held, too. For a
`CorrectionMethod` the layers are those of a sparse checkpoint, and what is solved is the correction beside each.

Each finished block is saved (`workdir`); a run that was killed loads what is finished, replays only the forward passes,
and ends with the same bits as an uninterrupted one.

Legend: O = out features, I = in features, T = tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.layout import LayerForm
from maskgen.core.packed import PackedTensor, StoredLayer
from maskgen.hf import blocks
from maskgen.hf.planning import Plan
from maskgen.methods import LocalMethod
from maskgen.methods.blockwise import BlockMethod
from maskgen.methods.correction import CorrectionMethod
from maskgen.numerics.memory import peak_rss_bytes
from maskgen.numerics.products import products_dtype
from maskgen.recipes.recipe import Recipe
from maskgen.recipes.sections import form_of
from maskgen.sweep.asymmetric import BesideDense, paths_in
from maskgen.sweep.layers import check_prior, correct_layer, solve_layer
from maskgen.sweep.observe import InputStatistics, advance, observe
from maskgen.sweep.reconstruct import Fitted, Teacher, Training
from maskgen.sweep.report import BLOCK_DONE, Progress, SweepReport
from maskgen.sweep.wiring import Wiring, Wirings
from maskgen.sweep.workdir import WorkDir, run_digest


@torch.no_grad()
def sweep(
    model: nn.Module,
    todo: Plan,
    recipe: Recipe,
    windows: Tensor | None,
    work_dir: Path,
    base_digest: str,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    prior: Callable[[str], Tensor] | None = None,
    prior_digest: str | None = None,
    prior_weight: Callable[[str], Tensor] | None = None,
    sparse: SparseCheckpoint | None = None,
) -> tuple[SweepReport, WorkDir]:
    """Prune the layers that `todo` plans of `model` (on the CPU) in place; packed, they are in the returned `WorkDir`.

    `windows` are calibration tokens `[S, T]`, or None for a method that needs none. `base_digest` is the digest of the
    weights `model` was loaded from. `prior` gives the mask `[O, I]` to start from by layer name (`KeyError` where there
    is none), and `prior_digest` says which masks these are; both are for methods with `uses_prior`, and for no other.
    Methods that train a block take them in place of what the recipe's [prior] would make, and with `prior_weight` its
    weights too, where the mask keeps them. A `CorrectionMethod` adds to the checkpoint `sparse`, whose layers stay as
    they are; `prior_digest` says which one that is. Raises `ModelError`, `DataError`, `NumericalError` (naming the
    layer or block), and `OutputExistsError` when `work_dir` belongs to another run.
    """
    fits, built = recipe.block_method(), recipe.build_method()
    adds = built if isinstance(built, CorrectionMethod) else None
    method = None if adds is not None or (fits is not None and prior is not None) else recipe.local_method()
    assert windows is not None or not recipe.needs_data
    assert method is None or (prior is not None) == method.uses_prior
    assert (adds is None) == (sparse is None)
    data = windows if recipe.needs_data else None
    if prior is not None:
        check_prior(prior, {name: linear for block in todo.targets for name, linear in block.items()}, recipe.pattern)
    form = form_of(recipe.pattern, recipe.values, None if method is None else method.correction)
    if adds is not None and sparse is not None:
        form = LayerForm(recipe.pattern, sparse.config.values, adds.correction, sparse.config.group)
    work = WorkDir(work_dir, run_digest(recipe, base_digest, windows, device, prior_digest), form)
    unfinished = [index for index in range(len(todo.blocks)) if not work.has(index)]
    run = _Sweep(
        method, fits, adds, recipe.calibration.seed, todo, work, torch.device(device), progress,
        max(unfinished, default=-1), prior, prior_weight, sparse,
    )  # fmt: skip
    if data is not None and unfinished:
        products, batches = _products(todo, run.device), data.split(recipe.calibration.batch)
        run.recording = blocks.record(model, todo.blocks, batches, products)
        run.teacher = Teacher.of(run.recording) if run.follows_dense else None
    for index in range(len(todo.blocks)):
        run.prune_block(index)
    report = SweepReport(
        targets=tuple(name for targets in todo.targets for name in targets),
        ignored=todo.ignored,
        solve_s=run.solve_s,
        total_s=time.perf_counter() - run.started_s,
        million_weights=sum(linear.weight.numel() for block in todo.targets for linear in block.values()) / 1e6,
        peak_rss_bytes=peak_rss_bytes(),
        resumed_blocks=run.resumed_blocks,
        fitted=run.fitted,
        corrects=adds is not None,
    )
    return report, work


def _products(todo: Plan, device: torch.device) -> torch.dtype:
    """The dtype of matrix products while blocks run: by that of the layers to prune, as stored."""
    stored = {linear.weight.dtype for targets in todo.targets for linear in targets.values()}
    return products_dtype(stored.pop() if len(stored) == 1 else blocks.COMPUTE_DTYPE, device)


@dataclass
class _Sweep:
    """One run over one model: the state that goes from block to block."""

    method: LocalMethod | None
    fits: BlockMethod | None
    adds: CorrectionMethod | None
    seed: int
    plan: Plan
    work: WorkDir
    device: torch.device
    progress: Callable[[Progress], None] | None
    last_to_solve: int
    prior: Callable[[str], Tensor] | None = None
    prior_weight: Callable[[str], Tensor] | None = None
    sparse: SparseCheckpoint | None = None
    recording: blocks.Recording | None = None
    teacher: Teacher | None = None
    wirings: Wirings = field(default_factory=Wirings)
    solve_s: dict[str, float] = field(default_factory=dict)
    fitted: dict[int, Fitted] = field(default_factory=dict)
    resumed_blocks: int = 0
    started_s: float = field(default_factory=time.perf_counter)

    @property
    def follows_dense(self) -> bool:
        """Whether the activations of the dense model are needed, too."""
        solver = self.method or self.adds
        return self.fits is not None or (solver is not None and solver.is_asymmetric)

    def prune_block(self, index: int) -> None:
        """Solve block number `index` or load it, put its pruned weights in, and run it to get the next one's inputs."""
        block, targets = self.plan.blocks[index], self.plan.targets[index]
        dtypes = {name: linear.weight.dtype for name, linear in targets.items()}
        with blocks.upcast(block, self.device):
            wiring = self._wiring(index)  # before the block is pruned
            runs_dense = self._needs_dense_outputs(index) and (wiring is None or self.work.has(index))
            if self.teacher is not None and self.recording is not None and runs_dense:
                self.teacher.run(block, index, self.recording, self.device)
            advanced = False
            if self.work.has(index):
                layers, fitted = self.work.load(index, {name: linear.weight.shape for name, linear in targets.items()})
                self.resumed_blocks += 1
                self._put(index, layers)
            else:
                layers, fitted = self._solve(index, dtypes, wiring), None
                if self.fits is not None and layers:
                    layers, fitted = self._fit(index, layers, dtypes)
                    advanced = True
                self.work.save(index, layers, fitted)
            if fitted is not None:
                self.fitted[index] = fitted
            if self.recording is not None and index < self.last_to_solve and not advanced:
                advance(block, index, self.recording, self.device)
            if self.teacher is not None:
                self.teacher.advance()
        self._report(index, BLOCK_DONE)

    def _put(self, index: int, layers: Mapping[str, StoredLayer]) -> None:
        for name, layer in layers.items():
            linear = self.plan.targets[index][name]
            linear.weight.data = layer.dense(blocks.COMPUTE_DTYPE).to(self.device)

    def _needs_dense_outputs(self, index: int) -> bool:
        """Whether what the dense block puts out is read by the next block, or by the training of this one."""
        return index < self.last_to_solve or (self.fits is not None and index == self.last_to_solve)

    def _wiring(self, index: int) -> Wiring | None:
        """How a block is wired that is solved stage by stage, None for others."""
        solver, targets = self.method or self.adds, self.plan.targets[index]
        if self.recording is None or not targets or solver is None or not solver.is_asymmetric:
            return None
        block, call = self.plan.blocks[index], self.recording.call(0, index)
        return self.wirings.of(
            block, list(paths_in(block, targets).values()), self.recording.hidden[0], call, self.device
        )

    def _observed(self, index: int, wiring: Wiring | None) -> Iterator[tuple[Sequence[str], InputStatistics | None]]:
        """The block's layers, dense as yet, with statistics of their inputs if the method wants any.

        They come at once, or stage by stage; what one stage gives is to be put in before the next is asked for.
        """
        targets, method = self.plan.targets[index], self.method if self.adds is None else self.adds
        sees_none = isinstance(method, LocalMethod) and not method.needs_data
        if self.recording is None or not targets or method is None or sees_none:
            yield list(targets), None
            return
        block = self.plan.blocks[index]
        if wiring is not None:
            assert self.teacher is not None
            beside = BesideDense.of(method, block, index, targets, wiring, self.recording, self.teacher, self.device)
            for names in beside.stages:
                inputs = beside.observe(names, names is beside.stages[-1] and self._needs_dense_outputs(index))
                self._report(index, "calibration inputs")
                yield names, inputs
            return
        inputs = observe(method, targets, block, index, self.recording, self.device)
        self._report(index, "calibration inputs")
        yield list(targets), inputs

    def _solve(self, index: int, dtypes: Mapping[str, torch.dtype], wiring: Wiring | None) -> dict[str, StoredLayer]:
        """Solve the layers of a block and put what comes out into it."""
        layers: dict[str, StoredLayer] = {}
        for names, inputs in self._observed(index, wiring):
            solved = {}
            for name in names:
                started_s = time.perf_counter()
                stats = None if inputs is None else inputs.take(name)
                solved[name] = self._solve_layer(name, self.plan.targets[index][name], stats, dtypes[name])
                self.solve_s[name] = time.perf_counter() - started_s
                self._report(index, name)
            self._put(index, solved)
            layers |= solved
        return {name: layers[name] for name in self.plan.targets[index]}

    def _solve_layer(self, name: str, linear: nn.Linear, stats: Any, dtype: torch.dtype) -> StoredLayer:
        prior_OI = None if self.prior is None else self.prior(name).to(self.device)
        form = self.work.form
        if self.adds is not None:
            assert self.sparse is not None
            return correct_layer(self.adds.solve, linear.weight, self.sparse.packed(name), stats, dtype, name)
        if self.method is None:
            assert prior_OI is not None
            weight_OI = linear.weight if self.prior_weight is None else self.prior_weight(name)
            return StoredLayer(PackedTensor.pack(weight_OI.to("cpu", dtype), prior_OI.cpu(), form.pattern, name))
        return solve_layer(self.method, linear.weight, stats, form, dtype, name, prior_OI)

    def _fit(
        self, index: int, layers: Mapping[str, StoredLayer], dtypes: Mapping[str, torch.dtype]
    ) -> tuple[dict[str, StoredLayer], Fitted]:
        """Train the block that `layers` were put into; its layers as they are then."""
        assert self.fits is not None and self.recording is not None and self.teacher is not None
        targets = self.plan.targets[index]
        masks = {name: layer.packed.mask() for name, layer in layers.items()}
        training = Training(
            self.fits, self.plan.blocks[index], index, targets, masks, dtypes, self.recording, self.teacher, self.device
        )
        fitted = training.run(self.seed, lambda what: self._report(index, what))
        self._report(index, f"reconstruction, loss {fitted.before:.4g} -> {fitted.after:.4g}")
        packed = {
            name: PackedTensor.pack(linear.weight.to("cpu", dtypes[name]), masks[name], self.work.form.pattern, name)
            for name, linear in targets.items()
        }
        return {name: StoredLayer(weight) for name, weight in packed.items()}, fitted

    def _report(self, block: int, what: str) -> None:
        if self.progress is not None:
            elapsed_s = time.perf_counter() - self.started_s
            self.progress(Progress(block, len(self.plan.blocks), what, elapsed_s, peak_rss_bytes()))

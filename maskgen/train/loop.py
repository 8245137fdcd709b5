"""The training loop: runs steps, and evaluates, logs and writes checkpoints at intervals.

Evaluations and checkpoints never change what is learned, so their intervals are flags and no part of the recipe. The
order at a step's end is log, evaluation, checkpoint: whatever a checkpoint covers is in the log before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core.errors import NumericalError, OutOfMemoryError, StorageError
from maskgen.core.failures import explained
from maskgen.core.mask import pack_bits, unpack_bits
from maskgen.data.corpus import Corpus
from maskgen.methods.learned import Mode
from maskgen.train.checkpoints import Checkpoints
from maskgen.train.log import TrainLog
from maskgen.train.step import Session, TrainingStep, heldout_nll

EVALUATIONS = 5
"""How often a run looks at its masks when nobody says, the look before the first step not counted."""

CHECKPOINT_EVERY_S = 300.0
SAVING_SHARE = 20
"""Unless told otherwise, a run works this many times as long as its last checkpoint took to write, or longer."""


@dataclass(frozen=True)
class Cadence:
    """What a machine's owner decides. `eval_every` and `checkpoint_every` are steps; 0 stands for a default."""

    micro_batch: int = 8
    eval_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def evaluates(self, step: int, steps: int) -> bool:
        """Whether the masks are looked at after `step` of `steps`; always after the last."""
        every = self.eval_every or math.ceil(steps / EVALUATIONS)
        return step == steps or step % every == 0

    def saves(self, step: int, steps: int, since_s: float, cost_s: float) -> bool:
        """Whether a checkpoint is written after `step`; always at the end.

        `since_s` seconds are over since the one before, which took `cost_s`. The cost counts the digests, which process
        0 takes of all shards: with many processes and states of many gigabytes, that is most of it.
        """
        if self.checkpoint_every:
            return step == steps or step % self.checkpoint_every == 0
        return step == steps or since_s >= max(CHECKPOINT_EVERY_S, SAVING_SHARE * cost_s)


@dataclass(frozen=True)
class Stage:
    """What begins now: "loading", "prior" (masks to start from are made), "training", "measuring", "writing"."""

    name: str


@dataclass(frozen=True)
class HeldOut:
    """The model as it would be exported after `step` steps, on held-out text; losses in nats per token.

    `agreement` is the fraction of mask entries equal to the mask the run started from (the prior, where there is one),
    `flipped` the fraction that changed since the evaluation before. `dense_nll` is the model without any sparsity.
    """

    step: int
    heldout_nll: float
    perplexity: float
    agreement: float
    flipped: float
    elapsed_s: float
    dense_nll: float | None = None
    dense_perplexity: float | None = None


@dataclass
class Watch:
    """Remembers masks: those the run started from, and those of the last evaluation, as bits by layer name."""

    start: Mapping[str, Tensor]
    last: Mapping[str, Tensor]

    @classmethod
    def begin(cls, session: Session, prior: Mapping[str, Tensor] | None) -> Watch:
        """Before the first step. `prior` are bitmasks; without it, the masks of the session as it is."""
        now = bitmasks(session)
        return cls(now if prior is None else prior, {name: bits.clone() for name, bits in now.items()})

    def look(self, session: Session, corpus: Corpus, micro_batch: int) -> HeldOut:
        """Evaluate the masks of now; they are the last ones from here on. Raises `NumericalError`."""
        now = bitmasks(session)
        agreement = 1 - difference(now, self.start)
        flipped = difference(now, self.last)
        for name, bits in now.items():
            self.last[name].copy_(bits)
        dense = None if session.step else _heldout_nll(session, corpus, micro_batch, Mode.DENSE)
        hard = _heldout_nll(session, corpus, micro_batch, Mode.HARD)
        return HeldOut(
            session.step, hard, perplexity(hard), agreement, flipped, session.elapsed_s, dense,
            None if dense is None else perplexity(dense),
        )  # fmt: skip

    def layers(self, session: Session) -> dict[str, Any]:
        """Agreement and how often each pattern occurs ("1100" keeps the first two columns of a group), by layer."""
        return {
            name: {
                "agreement": 1 - difference({name: bits}, self.start),
                "patterns": pattern_counts(unpack_bits(bits), session.layers[name].pattern.m),
            }
            for name, bits in bitmasks(session).items()
        }


def fit(
    session: Session,
    corpus: Corpus,
    log_file: Path,
    header: Mapping[str, Any],
    checkpoints: Checkpoints,
    prior: Mapping[str, Tensor] | None,
    cadence: Cadence,
    progress: Callable[[TrainingStep | HeldOut], None],
) -> None:
    """Train `session` to its last step, from the newest checkpoint if there is one.

    Raises `NumericalError`, `StorageError` and `OutOfMemoryError`, which say what is kept.
    """
    watch = Watch.begin(session, prior)
    if session.group.first:
        checkpoints.clean()
    session.group.wait()
    checkpoints.restore(session, watch.last)
    with TrainLog(log_file, header, session.step) if session.group.first else nullcontext() as log:
        try:
            with explained(log_file.parent):
                _loop(session, corpus, log, checkpoints, watch, cadence, progress)
        except (NumericalError, StorageError, OutOfMemoryError) as error:
            raise type(error)(f"{error}; {checkpoints.what_is_kept()}") from error


def _loop(
    session: Session,
    corpus: Corpus,
    log: TrainLog | None,
    checkpoints: Checkpoints,
    watch: Watch,
    cadence: Cadence,
    progress: Callable[[TrainingStep | HeldOut], None],
) -> None:
    steps, saved_s, cost_s = session.spec.steps, time.monotonic(), 0.0

    def tell(kind: str, what: TrainingStep | HeldOut) -> None:
        if log is not None:
            log.add(kind, asdict(what))
            progress(what)

    if session.step == 0:
        tell("eval", watch.look(session, corpus, cadence.micro_batch))
    while session.step < steps:
        tell("step", session.run_step(corpus, cadence.micro_batch))
        if cadence.evaluates(session.step, steps):
            tell("eval", watch.look(session, corpus, cadence.micro_batch))
        if session.step == steps:
            layers = watch.layers(session)
            if log is not None:
                log.add("layers", {"step": steps, "layers": layers})
        begun_s = time.monotonic()
        if session.group.any(cadence.saves(session.step, steps, begun_s - saved_s, cost_s)):
            if log is not None:
                log.flush()
            checkpoints.save(session, watch.last)
            saved_s = time.monotonic()
            cost_s = saved_s - begun_s


def _heldout_nll(session: Session, corpus: Corpus, micro_batch: int, mode: Mode) -> float:
    nll = heldout_nll(session, corpus.heldout, micro_batch, mode)
    if not math.isfinite(nll):
        advice = "check that the model itself runs" if mode is Mode.DENSE else "lower train.lr"
        raise NumericalError(
            f"step {session.step}: the loss of the {mode.value} model on held-out text is {nll}; {advice}, or compute "
            "with train.dtype=float32"
        )
    return nll


@torch.no_grad()
def bitmasks(session: Session) -> dict[str, Tensor]:
    """The masks that would be exported now, as bits on the CPU, by layer name."""
    return {name: pack_bits(layer.mask().cpu()) for name, layer in session.layers.items()}


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Fraction of the entries of `one` that differ from those of `other`, from bitmasks."""
    changed = sum(int(unpack_bits(bits ^ other[name]).sum()) for name, bits in one.items())
    return changed / sum(8 * bits.numel() for bits in one.values())


def pattern_counts(mask_OI: Tensor, m: int) -> dict[str, int]:
    """How many groups of `m` columns keep which of them; for m up to 8, where the patterns can be listed."""
    if m > 8:
        return {}
    place_m = 2 ** torch.arange(m - 1, -1, -1)
    codes = (mask_OI.unflatten(1, (-1, m)) * place_m).sum(-1).flatten()
    counts = torch.bincount(codes, minlength=2**m).tolist()
    return {format(code, f"0{m}b"): count for code, count in enumerate(counts) if count}


def perplexity(nll: float) -> float:
    """exp, and a number that JSON can hold even for a model that is lost."""
    return math.exp(min(nll, 700.0))

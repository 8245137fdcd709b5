"""What is checked of a model's weights: their form, digests and zeros before the engine starts, what its workers hold
once they have them, and what comes of the first step through the whole model.

No vLLM import at the top.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgen.core.checkpoint import INDEX_NAME, SINGLE_NAME, SparseCheckpoint, is_sparse_checkpoint, read_headers
from maskgen.core.config import QUANT_METHOD
from maskgen.core.errors import FormatError
from maskgen.core.settings import NOT_RECORDED, check_settings
from maskgen.core.zeros import zero_weights
from sparse_serve.engine.vllm_defaults import SAFETENSORS
from sparse_serve.runtime.errors import EngineStartError, SettingsError

logger = logging.getLogger(__name__)

_INSTEAD = "download or make the model again, or if that is meant, give --allow-zero-weights"
_ROUNDING = 1e-6


@dataclass(frozen=True)
class WeightChecks:
    """Form and finite numbers are always checked; `digests` of a checkpoint's files are if asked for, and unless
    `allow_zeros` also whether anything that multiplies is all zeros, or makes all logits equal.
    """

    digests: bool = False
    allow_zeros: bool = False

    def check_files(self, model: str, load_format: str) -> None:
        """Check what is in a directory, read as `load_format` says. A dense model of the hub is for vLLM to find.

        Raises `FormatError`, and `SettingsError` where there is nothing to compare digests with.
        """
        if is_sparse_checkpoint(model):
            from sparse_serve.plugin.config import verify

            verify(model)
        if self.digests:
            _check_digests(model)
        if not self.allow_zeros and load_format in (QUANT_METHOD, *SAFETENSORS):
            _check_zeros(Path(model))

    def check_loaded(self, model: str, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Check what the ranks say of their parameters (`plugin.worker.SparseStats`). Raises `EngineStartError`."""
        broken = sorted({name for rank in ranks for name in rank["not_finite"]})
        dead = [] if self.allow_zeros else sorted({name for rank in ranks for name in rank["zero_norms"]})
        if broken:
            raise EngineStartError(
                f"{len(broken)} parameters of {model} hold NaN or infinity, such as {broken[0]}; download or make the "
                "model again"
            )
        if dead:
            raise EngineStartError(
                f"{len(dead)} norms of {model} hold nothing but zeros, such as {dead[0]}; {_INSTEAD}"
            )

    def check_answer(self, numbers: Sequence[float], even: float | None, dtype: str) -> None:
        """Check an embedding, or log-probabilities of tokens, of which each has the probability `even` if all logits
        are equal. Raises `EngineStartError`."""
        what = "an embedding has" if even is None else "the log-probability of a first token is"
        if wrong := next((number for number in numbers if not math.isfinite(number)), None):
            raise EngineStartError(
                f"{what} {wrong}: this model cannot be served in {dtype}; try --dtype float32, or make the model again"
            )
        if even is None or self.allow_zeros:
            return
        if all(math.isclose(number, math.log(even), abs_tol=_ROUNDING) for number in numbers):
            raise EngineStartError(
                f"every token is as likely as any other, whatever the prompt: the logits are all equal; {_INSTEAD}"
            )


USUAL = WeightChecks()


def _check_digests(model: str) -> None:
    """Compare a checkpoint with the digests in its manifest, and what is beside it with the record of that.

    Where there is no record, this is logged.
    """
    if not is_sparse_checkpoint(model):
        raise SettingsError(f"--verify-digests: {model} is not a sparse checkpoint, and no other has digests")
    SparseCheckpoint.open(model, verify_bits=False).verify_digests()
    if check_settings(model) is None:
        logger.warning("%s: config.json and the tokenizer are not covered: %s", model, NOT_RECORDED)


def _check_zeros(model: Path) -> None:
    if not any((model / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
        return
    try:
        headers = read_headers(model)
    except FormatError as error:
        if is_sparse_checkpoint(model):
            raise
        logger.warning("not looked for weights that are zeros, as vLLM may read what we do not: %s", error)
        return
    if zeros := zero_weights(headers):
        raise FormatError(
            f"{headers[zeros[0]].path}: {zeros[0]} holds nothing but zeros"
            + (f", and so do {len(zeros) - 1} other weights" if zeros[1:] else "")
            + f"; {_INSTEAD}"
        )

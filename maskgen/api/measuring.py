"""`evaluate`, `inspect`, `load`, `report` and `demo`: measure models, show training runs, make the demo model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from maskgen.api import checks
from maskgen.api.events import Listener, Scored, Stage, silent
from maskgen.api.requests import DemoRequest, EvaluateRequest, InspectRequest, ReportRequest
from maskgen.core.errors import SparseError
from maskgen.core.pattern import NMPattern
from maskgen.core.perplexity import Perplexity, Protocol, Window
from maskgen.data import tokens
from maskgen.data.bos import Bos
from maskgen.export import inspect as inspect_module
from maskgen.export.inspect import InspectReport
from maskgen.hf import evaluate as evaluate_module
from maskgen.hf import model
from maskgen.train import demo as demo_module


@dataclass(frozen=True)
class EvaluateResult:
    """Perplexity of the model known as `model`, run in `dtype`, with its protocol and the windows that were scored."""

    model: str
    dtype: str
    perplexity: Perplexity
    windows: Sequence[Window]

    @property
    def value(self) -> float:
        """The perplexity."""
        return self.perplexity.value

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, with every window's loss and without the windows' tokens."""
        return {"model": self.model, "dtype": self.dtype, **self.perplexity.to_dict()}


@dataclass(frozen=True)
class ReportResult:
    """A page in `out`."""

    out: Path
    total_bytes: int


@dataclass(frozen=True)
class DemoResult:
    """A finished demo in `out`: a dense model, text to calibrate on, and text that it never saw."""

    out: Path

    @property
    def model(self) -> Path:
        """The dense model."""
        return self.out / "model"

    @property
    def calibration(self) -> Path:
        """What the model was trained on."""
        return self.out / "calibration.txt"

    @property
    def heldout(self) -> Path:
        """What it was not trained on."""
        return self.out / "heldout.txt"


def evaluate(request: EvaluateRequest, progress: Listener = silent) -> EvaluateResult:
    """Measure perplexity, dense or sparse, with the protocol stated.

    Raises `DataError` (the protocol, the text), `ModelError`, `RequestError` (the device), `FormatError` (a damaged
    checkpoint), `NumericalError` (the loss is not finite).
    """
    protocol = Protocol(request.window_tokens, request.stride_tokens, max_windows=request.max_windows)
    device, model_dir = checks.resolve_device(request.device), model.resolve(request.model)
    tokenizer = model.load_tokenizer(model_dir)
    bos = Bos.of(tokenizer, request.bos)
    protocol = replace(protocol, bos=bool(bos.ids), own_bos=bos.own)
    evaluate_module.check_window(protocol, model.stored_max_tokens(model_dir))
    ids = tokens.read_tokens(request.data, tokenizer).tolist()
    windows = protocol.windows(ids, bos.ids)
    progress(Stage("loading"))
    dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    loaded = model.load(model_dir, dtype, device)
    found = evaluate_module.perplexity(
        loaded,
        ids,
        protocol,
        bos.ids,
        request.batch,
        lambda done, total: progress(Scored(done, total)),
    )
    used = str(next(loaded.parameters()).dtype).removeprefix("torch.")
    return EvaluateResult(checks.label(request.model, model_dir), used, found, windows)


def inspect(request: InspectRequest) -> InspectReport:
    """What a directory holds, layer by layer: is it N:M, and how many bytes does it take?

    A sparse checkpoint is verified in full. Raises `FormatError`, `PatternError`.
    """
    return inspect_module.inspect(request.model, NMPattern.parse(request.pattern))


def load(
    source: str | Path,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str | None = None,
) -> torch.nn.Module:
    """A directory or hub id, dense or sparse, as an ordinary transformers model, ready for inference.

    A sparse one is decompressed; "auto" keeps the stored dtype. Raises `ModelError`, `FormatError`, `RequestError`.
    """
    where, kind = checks.resolve_device(device), dtype if dtype == "auto" else getattr(torch, dtype)
    return model.load(model.resolve(str(source)), kind, where)


def report(request: ReportRequest) -> ReportResult:
    """Compare learned runs, finished or not, in one HTML page. Needs the extra `report`.

    Raises `FormatError` for what is no log, `SparseError` when a package of the extra is not installed.
    """
    try:
        from maskgen.train.report.page import write
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise SparseError(
            f"maskgen report needs {package}, which is not installed: pip install 'sparse-serve[report]'"
        ) from None
    return ReportResult(request.out, write(request.runs, request.out))


def demo(request: DemoRequest | None = None, progress: Listener = silent) -> DemoResult:
    """Make a small trained model and text to try everything on, offline and in minutes, or find it made.

    Raises `OutputExistsError` when the directory holds something else, `SparseError` when none was given and the user
    has no home directory.
    """
    return DemoResult(demo_module.build(None if request is None else request.out, progress))

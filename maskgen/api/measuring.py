"""`evaluate`, `inspect`, `load`, `report` and `demo`: measure models, show training runs, make the demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from maskgen.api import checks, record
from maskgen.api.events import Listener, Scored, Stage, silent
from maskgen.api.requests import DemoRequest, EvaluateRequest, InspectRequest, ReportRequest
from maskgen.core.divergence import Divergence
from maskgen.core.errors import DataError, ModelError, RequestError, SparseError
from maskgen.core.failures import explained
from maskgen.core.files import check_writable
from maskgen.core.pattern import NMPattern
from maskgen.core.perplexity import Perplexity, Protocol, Window
from maskgen.core.quality import Quality
from maskgen.data import demo as demo_module
from maskgen.data import own, sources, tokens
from maskgen.data.bos import Bos
from maskgen.export import inspect as inspect_module
from maskgen.export.inspect import InspectReport
from maskgen.hf import evaluate as evaluate_module
from maskgen.hf import model
from maskgen.hf.logits import logits_of


@dataclass(frozen=True)
class TextResult:
    """What was measured on one text, whose file is called `text`, and the windows that were scored.

    `dense` and `divergence` are there when a dense model was given to compare with.
    """

    text: str
    perplexity: Perplexity
    windows: Sequence[Window]
    dense: Perplexity | None = None
    divergence: Divergence | None = None

    @property
    def value(self) -> float:
        """The perplexity."""
        return self.perplexity.value

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, with every window's numbers and without the windows' tokens."""
        compared: dict[str, Any] = {}
        if self.dense is not None and self.divergence is not None:
            dense = {"nll_per_window": self.dense.nll_per_window, "perplexity": self.dense.value}
            compared = {"dense": dense, "divergence": self.divergence.to_dict()}
        return {"text": self.text, **self.perplexity.to_dict(), **compared}


@dataclass(frozen=True)
class EvaluateResult:
    """The model known as `model`, run in `dtype`, on every one of `texts`.

    `against` is what the dense model it was compared with is known as, and `quality` what was kept of that beside the
    weights. `perplexity`, `windows` and `value` are those of the only text; `RequestError` when there are several.
    """

    model: str
    dtype: str
    texts: Sequence[TextResult]
    against: str | None = None
    quality: Quality | None = None

    @property
    def perplexity(self) -> Perplexity:
        """Of the only text: the perplexity with its protocol."""
        return self._only.perplexity

    @property
    def windows(self) -> Sequence[Window]:
        """Of the only text: the windows that were scored."""
        return self._only.windows

    @property
    def value(self) -> float:
        """Of the only text: the perplexity's value."""
        return self._only.value

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form: the one text's numbers beside the model's name, or a list of them for several."""
        names = {"model": self.model, "dtype": self.dtype}
        if self.against is not None:
            names["against"] = self.against
        found = [text.to_dict() for text in self.texts]
        return {**names, **found[0]} if len(found) == 1 else {**names, "texts": found}

    @property
    def _only(self) -> TextResult:
        if len(self.texts) != 1:
            raise RequestError(f"{len(self.texts)} texts were evaluated; each has its own result in `texts`")
        return self.texts[0]


@dataclass(frozen=True)
class ReportResult:
    """A page in `out`."""

    out: Path
    total_bytes: int


@dataclass(frozen=True)
class DemoResult:
    """A finished demo in `out`: a dense chat model; a recipe, text and conversations to prune it with; text to measure
    on.
    """

    out: Path

    @property
    def model(self) -> Path:
        """The dense model."""
        return self.out / "model"

    @property
    def calibration(self) -> Path:
        """Text of several kinds to calibrate on."""
        return self.out / demo_module.CALIBRATION

    @property
    def conversations(self) -> Path:
        """Conversations that the model wrote, to train on beside that text."""
        return self.out / demo_module.CONVERSATIONS

    @property
    def recipe(self) -> Path:
        """What prunes and trains that model in minutes."""
        return self.out / demo_module.RECIPE

    @property
    def heldout(self) -> list[Path]:
        """A text of each kind to measure on, none of which is in `calibration`."""
        return sorted((self.out / demo_module.HELDOUT).iterdir())


@explained()
def evaluate(request: EvaluateRequest, progress: Listener = silent) -> EvaluateResult:
    """Measure perplexity, dense or sparse, with the protocol stated; with `against` also how far it is from dense.

    Raises `DataError` (the protocol, a text), `ModelError` (also for two models that do not read the same tokens),
    `RequestError` (the device), `FormatError` (a damaged checkpoint), `NumericalError` (the loss is not finite).
    """
    _protocol(request, Bos(), None)  # mistakes come first
    record.check_keep(request)
    device, model_dir = checks.resolve_device(request.device), checks.find_model(request.model, progress)
    dense_dir = None if request.against is None else checks.find_model(request.against, progress)
    made = None if dense_dir is None or not request.keep else record.made_from(request.model, dense_dir)
    protocol, texts, vocabulary = _windows(request, model_dir)
    if dense_dir is not None and _windows(request, dense_dir) != (protocol, texts, vocabulary):
        raise ModelError(
            f"{request.model} and {request.against} make different tokens of the same text; `against` takes the dense "
            "model that the other was made from"
        )
    if dense_dir is not None and made is None:
        record.warn_of_another_base(model_dir, dense_dir)
    for windows in texts.values():
        model.check_ids(torch.tensor([max(window.ids) for window in windows]), vocabulary, model_dir)
    progress(Stage("loading"))
    dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    loaded = model.load(model_dir, dtype, device)
    logits = logits_of(loaded)
    dense = None if dense_dir is None else logits_of(model.load(dense_dir, dtype, device))
    total, results = sum(len(windows) for windows in texts.values()), list[TextResult]()
    for text, windows in texts.items():
        show = _counting(progress, sum(len(result.windows) for result in results), total)
        found = evaluate_module.measure(logits, windows, protocol, request.batch, dense, show)
        results.append(TextResult(text, found.perplexity, windows, found.dense, found.divergence))
    used = str(next(loaded.parameters()).dtype).removeprefix("torch.")
    against = None if request.against is None or dense_dir is None else checks.label(request.against, dense_dir)
    quality = None if made is None else record.keep(made, model_dir, results)
    return EvaluateResult(checks.label(request.model, model_dir), used, results, against, quality)


def _protocol(request: EvaluateRequest, bos: Bos, limit: int | None) -> Protocol:
    """The protocol for a model that reads at most `limit` tokens (None: any number)."""
    window_tokens = request.window_tokens
    if window_tokens is None:
        window_tokens = Protocol().window_tokens if limit is None else min(Protocol().window_tokens, limit)
    return Protocol(window_tokens, request.stride_tokens, bool(bos.ids), request.max_windows, bos.own)


def _windows(request: EvaluateRequest, model_dir: Path) -> tuple[Protocol, dict[str, list[Window]], Mapping[str, int]]:
    """The protocol, settled for a model, the windows of every text, by the text's name, and the model's vocabulary."""
    tokenizer = model.load_tokenizer(model_dir)
    bos = Bos.of(tokenizer, request.bos)
    limit = model.stored_max_tokens(model_dir)
    protocol = _protocol(request, bos, limit)
    evaluate_module.check_window(protocol, limit)
    texts: dict[str, list[Window]] = {}
    names = [source.name for source in request.data]
    for source in request.data:
        if own.is_own(source):
            raise RequestError(f"`data` {source}: what a model wrote itself says nothing of its quality; give a file")
        name = str(source) if sources.is_hub(source) or names.count(source.name) > 1 else source.name
        if name in texts:
            raise RequestError(f"`data` {name}: given twice; give every text once")
        ids = tokens.read_tokens(source, tokenizer).tolist()
        try:
            texts[name] = protocol.windows(ids, bos.ids)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return protocol, texts, tokenizer.get_vocab()


def _counting(progress: Listener, before: int, total: int) -> Callable[[int, int], None]:
    """Tells of the windows of one text as of those of all, `before` of which are scored."""
    return lambda done, _: progress(Scored(before + done, total))


@explained()
def inspect(request: InspectRequest) -> InspectReport:
    """What a directory holds, layer by layer: is it N:M, and how many bytes does it take?

    A sparse checkpoint is verified in full. Raises `FormatError`, `PatternError`.
    """
    return inspect_module.inspect(request.model, NMPattern.parse(request.pattern))


@explained()
def load(
    source: str | Path,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str | None = None,
) -> torch.nn.Module:
    """A directory, hub id or GGUF file, dense or sparse, as an ordinary transformers model, ready for inference.

    A sparse one is decompressed; "auto" keeps the stored dtype. Raises `ModelError`, `FormatError`, `RequestError`.
    """
    where, kind = checks.resolve_device(device), dtype if dtype == "auto" else getattr(torch, dtype)
    return model.load(checks.find_model(str(source), silent), kind, where)


@explained()
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
    check_writable(request.out)
    return ReportResult(request.out, write(request.runs, request.out))


@explained()
def demo(request: DemoRequest | None = None, progress: Listener = silent) -> DemoResult:
    """Make a real chat model and text to try everything on (`maskgen.data.demo`), or find it made.

    Raises `OutputExistsError` when the directory holds something else, `SparseError` when a package that carries the
    weights or the text is not installed, or none was given and the user has no home directory.
    """
    out = None if request is None else request.out
    return DemoResult(demo_module.build(out, lambda what: progress(Stage(what))))

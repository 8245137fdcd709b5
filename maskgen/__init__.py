"""maskgen: weights and text in, N:M masks and sparse checkpoints out.

    recipe + model + text --sweep | train--> masks (and weights, if the method changes them) --compress--> checkpoint

    import maskgen

    demo = maskgen.demo()
    request = maskgen.PruneRequest(recipe="sparsegpt", model=demo.model, data=demo.calibration, out="sparse")
    maskgen.prune(request, progress=print)
    model = maskgen.load("sparse")

Every function takes a request (`maskgen.api.requests`) and, where it takes long, a callback for its progress
(`maskgen.api.events`). Errors are `SparseError`s. Importing this package has no effects and imports neither torch nor
transformers; what is used is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskgen.api.converting import (
        CompressResult,
        ConvertResult,
        DecompressResult,
        PermuteResult,
        compress,
        convert,
        decompress,
        permute,
    )
    from maskgen.api.events import (
        Event,
        HeldOut,
        Listener,
        Planned,
        Scored,
        Stage,
        SweepProgress,
        TrainingStep,
    )
    from maskgen.api.measuring import (
        DemoResult,
        EvaluateResult,
        ReportResult,
        TextResult,
        demo,
        evaluate,
        inspect,
        load,
        report,
    )
    from maskgen.api.pruning import AlreadyFinished, LearnResult, PruneResult, learn, prune, run
    from maskgen.api.quantising import QuantiseResult, quantise
    from maskgen.api.requests import (
        CompressRequest,
        ConvertRequest,
        DecompressRequest,
        DemoRequest,
        EvaluateRequest,
        InspectRequest,
        LearnRequest,
        PermuteRequest,
        PruneRequest,
        QuantiseRequest,
        ReportRequest,
    )
    from maskgen.core.errors import SparseError
    from maskgen.export.inspect import InspectReport

_HOMES = {
    "maskgen.api.requests": (
        "CompressRequest", "ConvertRequest", "DecompressRequest", "DemoRequest", "EvaluateRequest", "InspectRequest",
        "LearnRequest", "PermuteRequest", "PruneRequest", "QuantiseRequest", "ReportRequest",
    ),
    "maskgen.api.events": (
        "Event", "HeldOut", "Listener", "Planned", "Scored", "Stage", "SweepProgress", "TrainingStep",
    ),
    "maskgen.api.pruning": ("AlreadyFinished", "LearnResult", "PruneResult", "learn", "prune", "run"),
    "maskgen.api.converting": (
        "CompressResult", "ConvertResult", "DecompressResult", "PermuteResult", "compress", "convert", "decompress",
        "permute",
    ),
    "maskgen.api.quantising": ("QuantiseResult", "quantise"),
    "maskgen.api.measuring": (
        "DemoResult", "EvaluateResult", "ReportResult", "TextResult", "demo", "evaluate", "inspect", "load", "report",
    ),
    "maskgen.export.inspect": ("InspectReport",),
    "maskgen.core.errors": ("SparseError",),
}  # fmt: skip
"""Where each name of the interface is defined: imported when it is first used."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AlreadyFinished",
    "CompressRequest",
    "CompressResult",
    "ConvertRequest",
    "ConvertResult",
    "DecompressRequest",
    "DecompressResult",
    "DemoRequest",
    "DemoResult",
    "EvaluateRequest",
    "EvaluateResult",
    "Event",
    "HeldOut",
    "InspectReport",
    "InspectRequest",
    "LearnRequest",
    "LearnResult",
    "Listener",
    "PermuteRequest",
    "PermuteResult",
    "Planned",
    "PruneRequest",
    "PruneResult",
    "QuantiseRequest",
    "QuantiseResult",
    "ReportRequest",
    "ReportResult",
    "Scored",
    "SparseError",
    "Stage",
    "SweepProgress",
    "TextResult",
    "TrainingStep",
    "compress",
    "convert",
    "decompress",
    "demo",
    "evaluate",
    "inspect",
    "learn",
    "load",
    "permute",
    "prune",
    "quantise",
    "report",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_HOME_OF[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

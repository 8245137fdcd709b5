"""`quantise`: a sparse checkpoint with float values -> one with codes, the nearest ones or chosen by text.

With text, codes are chosen as a sweep chooses them that prunes (`[values] kind = "int4"` of a recipe): block by block
and with error feedback, for the outputs that the float values give. The checkpoint is written out dense for it, zeros
included, and its masks are the prior of `admm`, which changes kept values only as far as the codes before them lack
something. A low-rank correction is in the dense weights then, and `admm` finds one of that rank again, which makes up
for the codes, too. Both copies are in OUT.work, from which a stopped run continues, until the result is written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from maskgen.api import checks
from maskgen.api.events import Listener, silent
from maskgen.api.pruning import prune
from maskgen.api.requests import DEFAULT_GROUP, CompressRequest, PruneRequest, QuantiseRequest
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import LowRankCorrection
from maskgen.core.digest import digest_file, digest_json, digest_weights
from maskgen.core.errors import DataError, RequestError
from maskgen.core.failures import explained
from maskgen.core.quality import QUALITY_FILE, Quality, read_quality
from maskgen.core.values import INT4
from maskgen.data.own import is_own
from maskgen.data.sources import is_hub
from maskgen.export import quantise as quantise_module
from maskgen.export.compress import CompressReport, decompress
from maskgen.hf import planning
from maskgen.sweep.workdir import finish, reserve_for_run, work_dir


@dataclass(frozen=True)
class QuantiseResult:
    """A sparse checkpoint with codes in `out`, and what was written.

    With `quality_dropped`, what was measured of the checkpoint that it was made from is not true of its new values, and
    was left out. `against_float` was measured on text held out of `data`: in it the checkpoint with float values takes
    the place of the dense model. It is None without text, or with too little.
    """

    out: Path
    written: CompressReport
    quality_dropped: bool
    against_float: Quality | None = None


@explained()
def quantise(request: QuantiseRequest, progress: Listener = silent) -> QuantiseResult:
    """Write a sparse checkpoint with float values again with 8-bit or 4-bit values; masks stay, and corrections.

    With text, low-rank corrections are solved for again together with the codes. Raises `FormatError` when the values
    are quantised already, `OutputExistsError`; and with text what `prune` does, and `RequestError` for values that are
    not int4 and for a checkpoint with corrections of another form.
    """
    group = group_of(request)
    if request.data and request.values != INT4:
        raise RequestError(f"`data`: only int4 codes are chosen with text; leave it out for {request.values}")
    if not request.data and (unused := [name for name in ("bos", "device") if getattr(request, name) is not None]):
        raise RequestError(f"`{unused[0]}`: says how codes are chosen with text; give `data`, or leave it out")
    had_quality = (request.model / QUALITY_FILE).is_file()
    with checks.new_output(request.out):
        if not request.data:
            return QuantiseResult(
                request.out, quantise_module.quantise(request.model, request.out, request.values, group), had_quality
            )
        swept = _swept(request, group, progress)
        written = quantise_module.quantise(request.model, request.out, INT4, group, SparseCheckpoint.open(swept).layer)
        against_float = read_quality(swept)
        finish(work_dir(request.out), keep=False)
    return QuantiseResult(request.out, written, had_quality, against_float)


def group_of(request: CompressRequest | QuantiseRequest) -> int | None:
    """How many values share a scale, None for those of a row; and for values that are no int4.

    Raises `RequestError` for a group of other values, which have a scale for each row, or none.
    """
    if request.values != INT4:
        if request.group is not None:
            raise RequestError(f"`group` {request.group}: only of int4 values; leave it out, or ask for `values` int4")
        return None
    group = request.group or DEFAULT_GROUP
    return None if group == "row" else group


def _swept(request: QuantiseRequest, group: int | None, progress: Listener) -> Path:
    """The checkpoint's layers with codes, as a checkpoint in OUT.work."""
    checkpoint = quantise_module.check(request.model, INT4)
    if not isinstance(checkpoint.config.correction, LowRankCorrection | None):
        raise RequestError(
            f"`data`: the layers of {request.model} have corrections that are not low-rank, which codes cannot be "
            "chosen beside; leave it out, or quantise before a correction is added"
        )
    work = work_dir(request.out)
    dense, masks, swept = work / "dense", work / "masks.safetensors", work / "swept"
    device = checks.resolve_device(request.device)
    data = [str(source) if is_own(source) or is_hub(source) else digest_file(source) for source in request.data]
    given = {"group": group, "data": data, "bos": request.bos, "device": torch.device(device).type}
    reserve_for_run(work, digest_json({"quantise": digest_weights(request.model), **given}))
    if not dense.exists():
        decompress(request.model, dense)
    replace(checkpoint.mask_set(), base_digest=digest_weights(dense)).save(masks)
    try:
        if not swept.exists():
            _sweep(request, checkpoint, dense, masks, swept, device, progress)
    except DataError:
        finish(work, keep=False)  # other text makes another run; only copies are lost
        raise
    return swept


def _sweep(
    request: QuantiseRequest,
    checkpoint: SparseCheckpoint,
    dense: Path,
    masks: Path,
    swept: Path,
    device: str,
    progress: Listener,
) -> None:
    """Sweep the checkpoint, written out as `dense`, under its own `masks`."""
    stay, correction = planning.dense_names(dense, checkpoint.config.targets), checkpoint.config.correction
    overrides = {
        "pattern": str(checkpoint.config.pattern), "ignore": list(stay), "method.mask": "prior",
        "values.kind": INT4, "values.group": request.group or DEFAULT_GROUP,
        "method.rank": correction.rank if isinstance(correction, LowRankCorrection) else 0,
    }  # fmt: skip
    prune(
        PruneRequest(
            recipe="admm",
            model=str(dense),
            prior=masks,
            data=request.data,
            bos=request.bos,
            overrides=tuple(f"{key}={json.dumps(value)}" for key, value in overrides.items()),
            device=device,
            out=swept,
            allow_unserved=True,
        ),
        progress,
    )

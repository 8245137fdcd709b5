"""Which layers a directory of another tool holds, and how each is stored: found from the names of its tensors."""

from __future__ import annotations

from maskgen.core.errors import FormatError, ModelError, clip
from maskgen.core.pattern import NMPattern
from maskgen.export.foreign import FLOATS, SCALE, TWO_FOUR, ForeignLayer, Source
from maskgen.export.foreign.bitmask import Bitmask
from maskgen.export.foreign.marlin24 import Marlin24
from maskgen.export.foreign.masked import CODES, Masked
from maskgen.export.foreign.maskllm import LearnedMask, MaskArchive


def find_layers(source: Source, pattern: NMPattern, archive: MaskArchive | None) -> dict[str, ForeignLayer]:
    """Every weight of two dimensions, by module. `archive` are masks for dense weights, each of which has to be there.

    Raises `FormatError` for a layout that is not known, and for 8-bit codes without scales.
    """
    layers: dict[str, ForeignLayer] = {}
    for name in source.headers:
        layer = _layer(source, name, pattern)
        if layer is None:
            continue
        if layer.name in layers:
            raise FormatError(f"{source.path}: {layer.name} is stored in two ways, one of them as {clip(name)}")
        layers[layer.name] = layer
    for module in () if archive is None else archive.modules:
        found = layers.get(module)
        if not isinstance(found, Masked) or source.headers[module + ".weight"].dtype not in FLOATS:
            raise ModelError(
                f"{source.path}: no dense weight {clip(module)}, for which there is a mask; are they of this model?"
            )
        assert archive is not None
        layers[module] = LearnedMask(source, module, found.shape, archive, pattern)
    return layers


def _layer(source: Source, name: str, pattern: NMPattern) -> ForeignLayer | None:
    """The layer whose main tensor is `name`; None for every other tensor."""
    module, _, last = name.rpartition(".")
    if last in ("compressed", "weight_packed") and pattern != TWO_FOUR:
        raise FormatError(f"{source.path}: {clip(name)} is stored as 2:4, not {pattern}; leave the pattern out")
    match last:
        case "compressed":
            return Bitmask.of(source, module)
        case "weight_packed":
            if module + ".meta" not in source.headers:
                raise FormatError(f"{source.path}: {clip(name)} has no meta beside it: not marlin-24, and not 2:4")
            return Marlin24.of(source, module)
        case "weight_g_idx" | "g_idx":
            raise FormatError(f"{source.path}: {clip(name)}: columns in another order (actorder) are not supported")
        case "weight":
            header = source.headers[name]
            if len(header.shape) != 2 or header.dtype not in (*FLOATS, *CODES):
                return None
            if (header.dtype in CODES) != (module + SCALE in source.headers):
                known = "without" if header.dtype in CODES else "with"
                raise FormatError(f"{source.path}: {clip(name)} is {header.dtype} {known} a weight_scale")
            return Masked(source, module, (header.shape[0], header.shape[1]), pattern)
    return None

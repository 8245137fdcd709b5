"""What vLLM makes of a sparse checkpoint, found out without loading it: which layers it serves packed, and which not.

The checkpoint is shown to vLLM's model (`build`) as the dense one it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm import __version__
from vllm.model_executor.models.registry import ModelRegistry

from maskgen.core.checkpoint import WEIGHT_SUFFIX, SparseCheckpoint, TensorHeader, is_sparse_checkpoint
from maskgen.core.errors import FormatError
from maskgen.core.failures import machine_failure
from maskgen.core.files import read_json
from maskgen.core.layout import VALUES_SUFFIX, suffixes
from maskgen.core.mask import BITMASK_SUFFIX
from maskgen.core.values import FLOAT
from sparse_serve.plugin.build import BuiltModel, build
from sparse_serve.runtime import vllm_version
from sparse_serve.runtime.errors import SettingsError

OUTSIDE = "outside of the decoder blocks"
NOT_PACKABLE = "vLLM builds it without asking how it is stored"
EXPERTS = "vLLM runs all experts of a layer in one kernel, on dense weights"
READ = "vLLM reads its dense weight"
CHOSEN = "left dense when the checkpoint was made"

_BLOCK_INDEX = re.compile(r"\.\d+\.")
_EXPERTS_CLASS = "RoutedExperts"


@dataclass(frozen=True)
class ServedLayers:
    """`sparse`: vLLM's packed layers, and the checkpoint's layers in each. `dense`: the checkpoint's other matrices,
    and why each is dense.
    """

    sparse: Mapping[str, list[str]]
    dense: Mapping[str, str]


def served_layers(checkpoint: SparseCheckpoint) -> ServedLayers:
    """Ask vLLM. Raises `SettingsError` if its version is refused or has no such model, `FormatError` if it cannot hold
    some target packed.
    """
    vllm_version.check()
    headers = _dense_headers(checkpoint)
    try:
        built = build(checkpoint.path, headers)
    except Exception as error:  # whatever a model of vLLM's raises
        if (failure := machine_failure(error)) is not None:
            raise failure from None
        raise _cannot_serve(checkpoint, error) from error
    return ServedLayers(_sparse(checkpoint, built), _dense(checkpoint, built, headers))


@contextmanager
def unknown_architecture(model: str) -> Iterator[None]:
    """Say of a model of an architecture that vLLM lacks what to do with it; for what makes vLLM's configuration.

    `model` is a directory, or a name of the hub whose `config.json` vLLM has read.
    """
    try:
        yield
    except ValueError as error:
        if "Model architectures" not in str(error):
            raise
        directory = Path(model)
        if is_sparse_checkpoint(directory):
            raise _cannot_serve(SparseCheckpoint.open(directory, verify_bits=False), error) from error
        stored = read_json(directory / "config.json") if directory.is_dir() else {}
        raise SettingsError(
            f"{_said(model, stored.get('architectures'), error)}; give a model of one that it serves: "
            "https://docs.vllm.ai/en/stable/models/supported_models"
        ) from error


def _cannot_serve(checkpoint: SparseCheckpoint, error: Exception) -> SettingsError:
    said = _said(str(checkpoint.path), checkpoint.hf_config.get("architectures"), error)
    return SettingsError(f"{said}; for other engines maskgen decompress makes it dense again")


def _said(model: str, architectures: object, error: Exception) -> str:
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    shown = f" ({', '.join(names) or 'none in config.json'})" if Path(model).is_dir() else ""
    return f"{model}: vLLM {__version__} cannot serve it{shown}: {_reason(_import_error(names) or error)}"


def _import_error(architectures: list[str]) -> Exception | None:
    """Why vLLM's code for a model cannot be imported here, if it cannot: vLLM's own message points to its log."""
    for name in architectures:
        try:
            if name in ModelRegistry.models:
                ModelRegistry.models[name].load_model_cls()
        except ImportError as error:
            return error
    return None


def _sparse(checkpoint: SparseCheckpoint, built: BuiltModel) -> dict[str, list[str]]:
    targets = set(checkpoint.config.targets)
    sparse = {}
    for name, parts in built.layers.items():
        packed = targets.intersection(parts)
        if packed and name in built.read_directly:
            raise FormatError(f"{name}: {READ}, so it cannot be served packed; {_again(name)}")
        if packed and len(packed) < len(parts):
            raise FormatError(
                f"{name} is one layer in vLLM, but of {parts} only {sorted(packed)} are sparse; make all of them "
                "sparse or none"
            )
        if packed:
            sparse[name] = parts
    missing = sorted(targets.difference(*sparse.values()))
    if missing:
        why = EXPERTS if built.elsewhere.get(missing[0]) == _EXPERTS_CLASS else NOT_PACKABLE
        raise FormatError(
            f"{checkpoint.path}: {len(missing)} of {len(targets)} sparse layers cannot be served packed by vLLM "
            f"{__version__}, first {missing[0]}: {why}; {_again(missing[0])}"
        )
    return sparse


def _again(name: str) -> str:
    return f"prune again with it dense: --set 'ignore=[\"*.{name.rpartition('.')[2]}\"]'"


def _dense(checkpoint: SparseCheckpoint, built: BuiltModel, headers: Mapping[str, TensorHeader]) -> dict[str, str]:
    targets = set(checkpoint.config.targets)
    packable = {part: name for name, parts in built.layers.items() for part in parts}
    dense = {}
    for tensor, header in headers.items():
        name = tensor.removesuffix(WEIGHT_SUFFIX)
        if name in targets or len(header.shape) < 2:
            continue
        if not _BLOCK_INDEX.search(name):
            dense[name] = OUTSIDE
        elif name in packable:
            dense[name] = READ if packable[name] in built.read_directly else CHOSEN
        else:
            dense[name] = EXPERTS if built.elsewhere.get(name) == _EXPERTS_CLASS else NOT_PACKABLE
    return dense


def _dense_headers(checkpoint: SparseCheckpoint) -> dict[str, TensorHeader]:
    """Headers of the tensors that the checkpoint has when it is dense, in a dtype that vLLM loads as it is."""
    targets, packed = checkpoint.config.targets, suffixes(checkpoint.config)
    parts = {name + suffix for name in targets for suffix in packed}
    headers = {name: header for name, header in checkpoint.headers.items() if name not in parts}
    for name in targets:
        bitmask = checkpoint.headers[name + BITMASK_SUFFIX]
        rows, packed_columns = bitmask.shape
        stored = checkpoint.headers[name + VALUES_SUFFIX].dtype
        dtype = stored if checkpoint.config.values == FLOAT else "BF16"
        headers[name + WEIGHT_SUFFIX] = TensorHeader(bitmask.path, dtype, (rows, packed_columns * 8))
    return headers


def _reason(error: Exception) -> str:
    """The line that tells why, without the list of everything that vLLM does support."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "validation error for" not in line] or [type(error).__name__]
    return telling[0].removeprefix("Value error, ").partition(" Supported architectures:")[0]

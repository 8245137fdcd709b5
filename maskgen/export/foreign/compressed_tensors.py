"""`quantization_config` of compressed-tensors, as far as it decides what the numbers of a checkpoint mean.

How a layer is stored shows in its tensors. What the section adds is checked against a closed list, because a number
that is read under the wrong scheme is a wrong model: symmetric codes of 4 or 8 bits with a scale for a tensor, for a
row, or for 128 inputs. Everything else is refused by name. Activations are not quantised by this project, so how a
server would have quantised them is only noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maskgen.core.config import CONFIG_KEY
from maskgen.core.errors import FormatError, clip

QUANT_METHOD = "compressed-tensors"
DENSE, BITMASK, MARLIN = "dense", "sparse-24-bitmask", "marlin-24"

_FORMATS = (None, DENSE, BITMASK, MARLIN, "int-quantized", "float-quantized", "naive-quantized")
_KEYS = {
    "quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "sparsity_config",
    "transform_config", "global_compression_ratio", "compression_ratio", "compression_config", "version",
}  # fmt: skip
_SPARSITY_KEYS = {
    "format", "sparsity_structure", "global_sparsity", "targets", "ignore", "registry_requires_subclass",
}  # fmt: skip
_LEGAL: Mapping[str, tuple[Any, ...]] = {
    "num_bits": (4, 8),
    "type": ("int", "float"),
    "symmetric": (True,),
    "strategy": ("tensor", "channel", "group"),
    "group_size": (None, -1, 128),
    "actorder": (None, False, "weight", "static"),
    "block_structure": (None,),
    "dynamic": (False,),
}
"""What may be said of a weight. Of the order of quantisation ("actorder"), only that which leaves columns in place."""


def check_section(hf_config: Mapping[str, Any], where: str) -> list[str]:
    """`FormatError` for a section that says anything this project does not know exactly; notes about what it drops."""
    section = hf_config.get(CONFIG_KEY)
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        method = section.get("quant_method") if isinstance(section, dict) else section
        raise FormatError(f"{where}: quant_method {clip(method)}, expected {QUANT_METHOD!r} or no {CONFIG_KEY} at all")
    where = f"{where}: {CONFIG_KEY}"
    _check_known(section, _KEYS, where)
    if section.get("format") not in _FORMATS:
        raise FormatError(
            f"{where}: format {clip(section['format'])}, expected one of {[name for name in _FORMATS if name]}; no "
            "other one of compressed-tensors holds 2:4 weights"
        )
    for key in ("kv_cache_scheme", "transform_config"):
        if section.get(key):
            raise FormatError(
                f"{where}: {key} {clip(section[key])} is not supported: it changes what the model computes"
            )
    _check_sparsity(section.get("sparsity_config"), where)
    notes = []
    for name, group in _groups(section, where):
        _check_weights(group.get("weights"), f"{where}: {name}: weights")
        if group.get("output_activations"):
            raise FormatError(f"{where}: {name}: output_activations are not supported")
        if group.get("input_activations"):
            notes = ["activations, which its servers quantise too, are not quantised here: less error, more time"]
    return notes


def _groups(section: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    groups = section.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise FormatError(f"{where}: config_groups {clip(groups)}, expected an object")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise FormatError(f"{where}: config_groups: {clip(name)} {clip(group)}, expected an object")
        _check_known(group, {"targets", "weights", "input_activations", "output_activations", "format"}, where)
        yield f"config_groups: {clip(name)}", group


def _check_sparsity(sparsity: Any, where: str) -> None:
    if sparsity is None:
        return
    if not isinstance(sparsity, dict):
        raise FormatError(f"{where}: sparsity_config {clip(sparsity)}, expected an object")
    _check_known(sparsity, _SPARSITY_KEYS, f"{where}: sparsity_config")
    if sparsity.get("format") not in (None, DENSE, BITMASK):
        raise FormatError(
            f"{where}: sparsity_config: format {clip(sparsity['format'])}, expected {DENSE!r} or {BITMASK!r}"
        )


def _check_weights(weights: Any, where: str) -> None:
    if not isinstance(weights, dict):
        raise FormatError(f"{where}: {clip(weights)}, expected an object")
    notes = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
    _check_known(weights, {*_LEGAL, *notes}, where)
    for key, legal in _LEGAL.items():
        value = weights.get(key)
        is_exact = any(value == one and type(value) is type(one) for one in legal)
        if key in weights and value is not None and not is_exact:
            raise FormatError(f"{where}: {key} {clip(value)} is not supported, only {list(legal)}")


def _check_known(value: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(value) - known)
    if unknown:
        raise FormatError(f"{where}: unknown keys {clip(unknown)}; what they would change is not known")

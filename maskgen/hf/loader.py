"""Teach `transformers` to read sparse checkpoints: `AutoModelForCausalLM.from_pretrained` decompresses on load.

The result is an ordinary dense model (plain `nn.Linear`, pruned weights +0, in the dtype asked for) that behaves and
saves as if it had been read from the masked dense checkpoint. Values of 8 bits become the floats they stand for. A
correction y += S (X x) is folded into the weight, mask * W + S X, summed in float32: any tool that evaluates the model
evaluates the same function, exactly so when it is loaded in float32, and with the sum rounded once when it is loaded in
bfloat16 (a server keeps both terms apart and rounds them separately).

Without this hook transformers refuses a checkpoint (`core.config.GUARD`). One that was written before there was a guard
it loads with a warning about an unknown `quant_method`, and fills every target layer with random numbers. So this file
is strict:

* the directory is verified by `SparseCheckpoint.open`, before a weight is read;
* checkpoint names go through the model's own renamings first; a model weight with no tensor, or a tensor that is
  no weight of the model, is a `FormatError` instead of the usual warning;
* shapes are compared after loading, because transformers skips that check for quantized models.

`register()` puts two classes into transformers' tables for `quant_method: sparse_nm`; it is idempotent, and nothing
happens on import. Written against the quantizer interface of transformers 5.16 to 5.19.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from maskgen.core import layout
from maskgen.core.checkpoint import WEIGHT_SUFFIX, SparseCheckpoint
from maskgen.core.config import QUANT_METHOD, WEIGHTS_KEY, SparseConfig
from maskgen.core.errors import FormatError
from maskgen.hf.stored import renamed


def register() -> None:
    """Make `from_pretrained` read sparse checkpoints in this process. Calling it again does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantizer(QUANT_METHOD)(_SparseLoader)
        register_quantization_config(QUANT_METHOD)(_HfSparseConfig)


class _HfSparseConfig(QuantizationConfigMixin):
    """`SparseConfig` as transformers expects it. `dequantize` makes transformers drop it from the config after
    loading."""

    quant_method = QUANT_METHOD
    dequantize = True

    def __init__(self, sparse: SparseConfig) -> None:
        self.sparse = sparse

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(SparseConfig.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.sparse.to_dict()


class _Unpack(ConversionOps):
    """All tensors of one layer -> its dense weight: bit for bit where it is only masked, else in float32."""

    def __init__(self, config: SparseConfig) -> None:
        self._config = config

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        stored = layout.read_layer(lambda suffix: input_dict[_pattern(suffix)][0], self._config)
        stored.verify(kwargs["full_layer_name"])
        exact = stored.packed.values.dtype if stored.is_masked_only else torch.float32
        return {WEIGHT_SUFFIX: stored.dense(exact)}


class _SparseLoader(HfQuantizer):
    """The methods of a quantizer that transformers calls while it loads a model, in that order."""

    quantization_config: _HfSparseConfig
    _checkpoint: SparseCheckpoint
    _expected: dict[str, Tensor]
    _model: nn.Module

    def update_tp_plan(self, config: Any) -> Any:
        """The first method that sees the config: take the guard away, or any name of a file that nobody verified."""
        if hasattr(config, WEIGHTS_KEY):
            delattr(config, WEIGHTS_KEY)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise FormatError("a sparse checkpoint is loaded from its directory, not from a state dict")
        self._checkpoint = SparseCheckpoint.open(Path(checkpoint_files[0]).parent)
        self._model, self._expected = model, dict(model.state_dict())

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        config = self._checkpoint.config
        unpack = WeightConverter(
            [_pattern(suffix) for suffix in layout.suffixes(config)], WEIGHT_SUFFIX, [_Unpack(config)]
        )
        conversions = [*weight_conversions, unpack]
        _check_names(self._checkpoint, self._model, self._expected, conversions)
        return conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, tensor in model.state_dict().items():
            expected = self._expected[name]
            if tensor.shape != expected.shape:
                raise FormatError(
                    f"{self._checkpoint.path}: {name}: shape {tuple(tensor.shape)}, config.json implies "
                    f"{tuple(expected.shape)}"
                )
        # Tensors that were renamed on the way, as all unpacked ones are, arrive in their stored dtype.
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self._expected[name].dtype)
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(op, _Unpack) for op in getattr(conversion, "operations", ()))
        ]
        del self._checkpoint, self._model, self._expected
        return model

    def is_serializable(self) -> bool:
        """The loaded model is dense and saves as one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The loaded model is dense and trains as one (its zeros do not stay zero)."""
        return True


def _check_names(
    checkpoint: SparseCheckpoint, model: Any, expected: Mapping[str, Tensor], conversions: list[Any]
) -> None:
    """`FormatError` unless the checkpoint's names, renamed by transformers, are exactly those of the model's
    weights."""
    stored = renamed(checkpoint.headers, conversions, model.base_model_prefix, expected)
    provided = {target for one in stored.values() for target in one.targets}
    tied = set(model.all_tied_weights_keys)
    missing = sorted(set(expected) - provided - tied - _matching(expected, model._keys_to_ignore_on_load_missing))
    extra = sorted(provided - set(expected) - _matching(provided, model._keys_to_ignore_on_load_unexpected))
    kind = type(model).__name__
    for names, problem in (
        (missing, f"the checkpoint lacks {len(missing)} tensors of {kind}"),
        (extra, f"{kind} has no place for {len(extra)} tensors of the checkpoint"),
    ):
        if names:
            raise FormatError(
                f"{checkpoint.path}: {problem}, such as {names[0]}; load it with AutoModelForCausalLM, or write the "
                "checkpoint again with maskgen"
            )


def _pattern(suffix: str) -> str:
    """The regular expression by which transformers finds tensors with this suffix."""
    return re.escape(suffix) + "$"


def _matching(names: Any, patterns: Any) -> set[str]:
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns or ())}

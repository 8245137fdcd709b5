"""Which linear layers of a checkpoint are one layer in vLLM: query, key and value, for instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm.model_executor.models.registry import ModelRegistry

from sparse_serve.runtime.errors import SettingsError


def fused_layers(architectures: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """vLLM's layer -> the checkpoint's, by last name, as the model class says; raises `SettingsError`."""
    for name in architectures:
        if name in ModelRegistry.models:
            model = ModelRegistry.models[name].load_model_cls()
            return dict(getattr(model, "packed_modules_mapping", {}))
    raise SettingsError(f"vLLM has no model for architectures {list(architectures)}; config.json names them")

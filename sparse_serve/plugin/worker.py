"""What a vLLM worker process can tell about its sparse layers.

vLLM mixes `WorkerExtension` into its worker class
(`--worker-extension-cls sparse_serve.plugin.worker.WorkerExtension`), and the server calls `sparse_stats` on every
rank. It counts the tensors that are really resident, not what a manifest says.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypedDict

import torch
from torch import nn

_MULTIPLYING_NORMS = ("RMSNorm", "LayerNorm")


class SparseStats(TypedDict):
    """Layers and bytes of one rank. `dense_equivalent_bytes`: the same weights stored dense in the served dtype.

    `not_finite` are the parameters that hold NaN or infinity, `zero_norms` those of norms that multiply by zero, by
    vLLM's names. `sparse_names` are the checkpoint's layers that are served sparse, several for one of vLLM's where it
    fuses them. `kernels` counts layers; two kernels that share a layer are joined by `+`. `choices` are the fields of
    `sparse_serve.engine.KernelChoice`, for each kind of layer and bucket of tokens that was measured. `ends_s`: when
    (`time.monotonic`) the worker was up, and when it had its weights; nothing without a sparse layer.
    """

    sparse_layers: int
    dense_layers: int
    kernels: dict[str, int]
    choices: list[dict[str, Any]]
    sparse_names: list[str]
    not_finite: list[str]
    zero_norms: list[str]
    sparse_weight_bytes: int
    dense_equivalent_bytes: int
    ends_s: dict[str, float]


class WorkerExtension:
    """Mixed into vLLM's worker; `self.model_runner` is the worker's."""

    model_runner: Any

    def sparse_stats(self) -> SparseStats:
        """Count layers and bytes of this rank's model."""
        from sparse_serve.kernels import LinearSpec
        from sparse_serve.plugin.linear import SparseNMLinearMethod
        from sparse_serve.tuning.selection import Choice

        model = self.model_runner.model
        stats = SparseStats(
            sparse_layers=0,
            dense_layers=0,
            kernels={},
            choices=[],
            sparse_names=[],
            not_finite=_not_finite(model),
            zero_norms=_zero_norms(model),
            sparse_weight_bytes=0,
            dense_equivalent_bytes=0,
            ends_s={},
        )
        kernels: Counter[str] = Counter()
        choices: dict[LinearSpec, Choice] = {}
        methods = []
        for module in model.modules():
            method = vars(module).get("quant_method")  # a LoRA layer would answer for the layer inside it
            if isinstance(method, SparseNMLinearMethod):
                assert method.choice is not None
                methods.append(method)
                kernels["+".join(method.choice.plan.kernels)] += 1
                choices[method.choice.spec] = method.choice
                stats["sparse_names"] += method.stored
                stats["sparse_weight_bytes"] += sum(getattr(module, name).nbytes for name in method.tensor_names)
                stats["dense_equivalent_bytes"] += method.dense_bytes
            elif type(method).__name__ == "UnquantizedLinearMethod":
                stats["dense_layers"] += 1
        if methods:
            stats["ends_s"]["workers"] = min(method.created_s for method in methods)
            stats["ends_s"]["weights"] = max(method.loaded_s for method in methods)
        stats["sparse_layers"] = sum(kernels.values())
        stats["kernels"] = dict(kernels)
        for spec, choice in choices.items():
            kind = {"out_features": spec.out_features, "in_features": spec.in_features, "values": spec.values}
            stats["choices"] += [
                kind | {"tokens": bucket.tokens, "kernel": bucket.kernel, "speedup": bucket.speedup}
                for bucket in choice.buckets
            ]
        return stats


def _not_finite(model: nn.Module) -> list[str]:
    """Parameters that hold NaN or infinity, if they have 16 bits or more; codes have checks of their own."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.itemsize >= 2 and not torch.isfinite(parameter).all()
    ]


def _zero_norms(model: nn.Module) -> list[str]:
    """Weights of norms that make everything zero. Norms of other classes may be stored as their distance from 1."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in _MULTIPLYING_NORMS
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and not weight.any()
    ]

"""vLLM's own model of a checkpoint, built without weights and without their memory: its layers, and what goes where.

    model = build(Path("CHECKPOINT"), read_headers(Path("CHECKPOINT")))
    model.layers["model.layers.0.self_attn.qkv_proj"]   # the checkpoint's modules whose weights vLLM loads there

Only running vLLM's code tells what it does with a checkpoint: which projections it fuses, how it renames modules, which
linear layers it never asks the quantization config about. So its model class is built with weights on torch's `meta`
device, whose tensors have shapes and no data, and is then given the checkpoint's tensors, without data too, to load.
While it does, every operation is followed from tensor to tensor: a parameter knows in the end which of the checkpoint's
tensors went into it, through whatever slices, transposes and concatenations.

A process can do this where no engine has been started in it, as often as it likes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from maskgen.core.checkpoint import WEIGHT_SUFFIX, TensorHeader
from sparse_serve.plugin.config import AnyDevice

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8, "I64": torch.int64}
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}
_FEW_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class BuiltModel:
    """vLLM's model of a checkpoint, on a single rank.

    `layers`: each linear layer that vLLM asks the quantization config about, under vLLM's name, and the modules of the
    checkpoint whose `weight` it loads there (several where vLLM fuses them, in order; none if it is made in another
    way). `read_directly`: those among them whose dense weight vLLM's other code reads, so that they cannot be packed.
    `elsewhere`: every other module of the checkpoint that has a `weight`, and the kind of vLLM's module that loads it.
    """

    model_class: str
    layers: Mapping[str, list[str]]
    read_directly: frozenset[str]
    elsewhere: Mapping[str, str]


class AllDense(AnyDevice):
    """A quantization config that leaves every layer dense. vLLM asks it about those it would ask `linear` about."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AllDense:
        """From any section of `config.json`."""
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Dense, or (for anything but a linear layer) vLLM's default."""
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def build(directory: Path, headers: Mapping[str, TensorHeader]) -> BuiltModel:
    """Build vLLM's model of a Hugging Face directory. `headers` are those of all its tensors, none of them packed.

    Raises whatever vLLM raises for a model it cannot build or a tensor it has no place for.
    """
    arguments = EngineArgs(
        model=str(directory),
        skip_tokenizer_init=True,
        enforce_eager=True,
        load_format="dummy",
        hf_overrides={"quantization_config": None},
    )
    vllm_config = arguments.create_engine_config()
    for config in (vllm_config.model_config.hf_config, vllm_config.model_config.hf_text_config):
        vars(config).pop("quantization_config", None)  # not None: some of vLLM's classes ask whether there is one
    quant_config = vllm_config.quant_config = AllDense()
    with set_current_vllm_config(vllm_config), _single_rank():
        model = _build(vllm_config)
        tensors = {name: torch.empty(h.shape, dtype=_DTYPES[h.dtype], device="meta") for name, h in headers.items()}
        flow = _load(model, tensors)
    layers: dict[str, list[str]] = {}
    elsewhere: dict[str, str] = {}
    for module in model.modules():
        if isinstance(module, LinearBase) and module.quant_config is quant_config:
            layers[module.prefix] = flow.modules(module.weight)
            continue
        for parameter in module.parameters(recurse=False):
            elsewhere.update(dict.fromkeys(flow.modules(parameter), type(module).__name__))
    direct = frozenset(module.kv_b_proj.prefix for module in model.modules() if isinstance(module, MLAAttention))
    return BuiltModel(type(model).__name__, layers, direct & layers.keys(), elsewhere)


def _build(vllm_config: VllmConfig) -> nn.Module:
    with set_default_torch_dtype(vllm_config.model_config.dtype), _Weightless():
        model: nn.Module = initialize_model(vllm_config)
    return model


def _load(model: Any, tensors: Mapping[str, Tensor]) -> _Flow:
    flow = _Flow(tensors)
    with flow:
        model.load_weights(iter(tensors.items()))
    return flow


class _Weightless(TorchFunctionMode):
    """While active, new tensors of many elements have no data. Small ones do: a model may compute with them at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None:
            weightless = func(*args, **{**kwargs, "device": "meta"})
            if weightless.numel() > _FEW_ELEMENTS:
                return weightless
        return func(*args, **kwargs)


class _Flow(TorchDispatchMode):
    """While active, notes for each memory which of some named tensors have gone into it, and where."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._places: dict[int, dict[str, int]] = {}  # of a memory: by name of what went into it, the first element
        self._alive: list[Tensor] = []  # a memory that is freed would give its place to another
        for name, tensor in tensors.items():
            self._note([tensor], [name], 0)

    def sources(self, tensor: Tensor) -> list[str]:
        """The names of what went into `tensor`, in the order of its elements."""
        places = self._places.get(_memory(tensor), {})
        return sorted(places, key=places.__getitem__)

    def modules(self, parameter: Tensor) -> list[str]:
        """The names of the modules whose `weight` went into a parameter, in that order."""
        weights = [name for name in self.sources(parameter) if name.endswith(WEIGHT_SUFFIX)]
        return [name.removesuffix(WEIGHT_SUFFIX) for name in weights]

    def _note(self, tensors: Iterable[Any], names: Iterable[str], place: int) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                places = self._places.setdefault(_memory(tensor), {})
                for name in names:
                    places.setdefault(name, place)
                self._alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = func is torch.ops.aten.copy_.default
        into_data = copies and args[1].is_meta and not args[0].is_meta
        result = args[0] if into_data else func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = [name for tensor in inputs for name in self.sources(tensor)]
        if names:
            self._note(tree_leaves(result), names, args[0].storage_offset() if copies else 0)
        return result


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _single_rank() -> Iterator[None]:
    """vLLM's layers ask which rank they are on; this process is the only one."""
    with tempfile.TemporaryDirectory() as folder:
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        try:
            parallel_state.initialize_model_parallel(1, 1)
            yield
        finally:
            parallel_state.cleanup_dist_env_and_memory()

"""Loading a sparse checkpoint so that no tensor of it is passed over: what the model does not take is refused by name.

vLLM's models refuse most names they do not know, but not all of them: a bias that no layer has, for instance, is
dropped without a word, though the checkpoint means it to be added. And a layer takes the first rows of a tensor that
has more than its own, as of a model with more heads than `config.json` says. So while a model loads, every operation is
watched: a tensor that none of them touched was not loaded, and where one rank loads the whole model, neither was a
tensor of which they used a part.

vLLM knows this loader as the load format `sparse_nm`, which `sparse-serve serve` asks for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.distributed import get_dp_group, get_pcp_group, get_pp_group, get_tp_group
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from maskgen.core.config import QUANT_METHOD
from maskgen.core.errors import FormatError, clip
from sparse_serve.runtime.startup_error import record_startup_error

LOAD_FORMAT = QUANT_METHOD

_BUFFERS = re.compile(
    r".*(\.inv_freq|\.cos_cached|\.sin_cached|\.masked_bias|\.rope\.freqs|(^|\.)(attn|attention|self_attn)\.bias)"
)
"""Constants that older releases of transformers stored: frequencies of positions, causal masks."""

NAME = "{name}"
NO_PLACE = (
    f"has no place for the tensor {NAME}, which would change what the model computes if it had; make the checkpoint "
    "again without it, or for the right model"
)
PARTLY = (
    f"takes a part of the tensor {NAME} only, and would compute something else: most likely sizes in config.json, such "
    "as the number of heads, are not those of the stored model; take the config.json that the model was written with"
)
"""What is said of a tensor that was not loaded."""

_PREDICTORS = ("mtp", "mtp_layers")
_MISSING = ("StageMissingLayer", "PPMissingLayer")

_BLOCK = re.compile(r"\.(\d+)\.")


class CheckedLoader(DefaultModelLoader):
    """vLLM's loader of safetensors files, which also finds out what the model did not take."""

    def __init__(self, load_config: LoadConfig) -> None:
        stock = copy.copy(load_config)
        stock.load_format = "auto"
        super().__init__(stock)
        self._watch = _Watch(False)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
        """vLLM's weights, of which each is watched from here on."""
        for name, tensor in super().get_all_weights(model_config, model):
            self._watch.add(name, tensor)
            yield name, tensor

    @record_startup_error()
    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load. Raises `FormatError` for a tensor that the model did not take and that no model needs to take."""
        self._watch = _Watch(_is_alone())
        with self._watch:
            super().load_weights(model, model_config)
        watch, self._watch = self._watch, _Watch(False)
        # a stage of a pipeline, and a draft that reads its target's files, leave tensors to others
        if (
            get_pp_group().world_size == 1
            and model_config.quantization == QUANT_METHOD
            and model_config.runner_type != "draft"
        ):
            absent = left_out(model)
            for names, problem in ((watch.untouched, NO_PLACE), (watch.partly, PARTLY)):
                names = [name for name in names if not absent.intersection(name.split("."))]
                said = f"{model_config.model}: {type(model).__name__} {problem}"
                check_taken(names, model_config.hf_text_config, said)


@dataclass
class _Watched:
    """Tensors in one memory, and how many bytes operations have had of it; views have none."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    is_touched: bool = False
    taken_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Of the largest of the tensors."""
        return max(tensor.nbytes for tensor in self.tensors.values())


class _Watch(TorchDispatchMode):
    """While active, notes which of some tensors are part of any operation, and with `whole` also how much of them.

    Those that are not are kept alive, so that no other tensor gets their memory and is taken for them.
    """

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self._whole = whole
        self._waiting: dict[int, _Watched] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Watch a tensor."""
        self._waiting.setdefault(_memory(tensor), _Watched()).tensors[name] = tensor

    @property
    def untouched(self) -> list[str]:
        """Names of those that no operation has had."""
        return sorted(name for watched in self._waiting.values() if not watched.is_touched for name in watched.tensors)

    @property
    def partly(self) -> list[str]:
        """Names of those of which operations have had a part."""
        return sorted(name for watched in self._waiting.values() if watched.taken_bytes for name in watched.tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and self._waiting and (watched := self._waiting.get(_memory(leaf))):
                watched.is_touched = True
                watched.taken_bytes += 0 if func.is_view else leaf.nbytes
                if not self._whole or watched.taken_bytes >= watched.nbytes:
                    del self._waiting[_memory(leaf)]
        return func(*args, **(kwargs or {}))


def left_out(model: nn.Module) -> set[str]:
    """Parts of the names of tensors that this model does without, on purpose: layers that vLLM leaves out (of an
    embedding model the output layer, or a tower that nobody asks for), experts of other ranks, predictors of several
    tokens at once.
    """
    parts = set(_PREDICTORS)
    for name, module in model.named_modules():
        if type(module).__name__ in _MISSING:
            parts.add(name.rpartition(".")[2])
        elif getattr(module, "use_ep", False) is True:
            parts.add("experts")
    return {part for part in parts if part and not part.isdecimal()}


def check_taken(missed: Iterable[str], text_config: Any, said: str) -> None:
    """`FormatError` for the first of the tensors that were not loaded, unless it is of a known kind that need not be;
    `said` is its text, with {name}.

    Those are an output layer that is tied to the embedding, blocks beyond those that the configuration asks for, and
    constants that are computed (`_BUFFERS`).
    """
    depth = getattr(text_config, "num_hidden_layers", None)
    tied = bool(getattr(text_config, "tie_word_embeddings", False))
    for name in missed:
        block = _BLOCK.search(name)
        is_beyond = block is not None and isinstance(depth, int) and int(block[1]) >= depth
        if is_beyond or _BUFFERS.fullmatch(name) or (tied and name.endswith("lm_head.weight")):
            continue
        raise FormatError(said.replace(NAME, clip(name)))


def _is_alone() -> bool:
    """Whether this rank loads all of the model but what a pipeline's other stages do: experts are divided among
    replicas, too.
    """
    return all(group().world_size == 1 for group in (get_tp_group, get_dp_group, get_pcp_group))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def register() -> None:
    """Add the loader to vLLM's, once per process."""
    from vllm.model_executor import model_loader

    if LOAD_FORMAT not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(LOAD_FORMAT)(CheckedLoader)

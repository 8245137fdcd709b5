"""Writes `maskgen/hf/vllm_models.json`: what vLLM serves, and which linear layers it can hold packed.

    make architectures [ARGS="--only LlamaForCausalLM ..."]       all entries anew, or these only

Its keys are vLLM's own architectures that generate text, and those of transformers that vLLM has no code for and runs
all the same. A family that transformers has is built small (`tests.vllm.tiny`), saved, and loaded by vLLM without
weights (`sparse_serve.plugin.build`). Null stands for one of vLLM's own with which that is not possible here, so that
its layers are unknown. Every family has a process and a time limit of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from torch import nn
from transformers import PretrainedConfig

from maskgen.core.checkpoint import WEIGHT_SUFFIX, TensorHeader, read_headers
from maskgen.hf.stored import Renamed, tensor_names
from tests.vllm import nursery, tiny

TABLE = Path(__file__).parents[2] / "maskgen" / "hf" / "vllm_models.json"
LIMIT_S = 180

Family = dict[str, Any]
"""The entry of one architecture: `fused`, `sparse`, `dense`."""


def main(argv: list[str]) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="architectures", description="make maskgen's table of what vLLM serves")
    parser.add_argument("--only", nargs="+", metavar="ARCHITECTURE", help="keep the other entries as they are")
    args = parser.parse_args(argv)
    nursery.prepare()
    import vllm

    families = json.loads(TABLE.read_text())["architectures"] if args.only else {}
    own = generating()
    for name in args.only or sorted({*own, *tiny.architectures()}):
        found = in_child(functools.partial(family, name))
        sys.stderr.write(f"{name}: {'unknown' if found is None else 'built'}\n")
        if found is not None or name in own:
            families[name] = found
    table = {"vllm": vllm.__version__.split("+")[0], "architectures": dict(sorted(families.items()))}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return 0


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a child process; None if it fails or takes longer than `LIMIT_S`."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"

        def child() -> int:
            signal.alarm(LIMIT_S)
            answer.write_text(json.dumps(work()))
            return 0

        return json.loads(answer.read_text()) if nursery.fork(child) == 0 else None


def generating() -> list[str]:
    """vLLM's architectures that generate text, its own and those it runs with transformers' code, sorted."""
    from vllm.model_executor.models import registry

    own = registry._TEXT_GENERATION_MODELS | registry._MULTIMODAL_MODELS | registry._TRANSFORMERS_SUPPORTED_MODELS
    return sorted(own)


def family(architecture: str) -> Family:
    """The entry of an architecture, over all variants of its small configuration."""
    sys.meta_path.append(Pictures())
    variants = [examine(config) for config in tiny.configs(architecture)]
    fused = {whole: parts for variant in variants for whole, parts in variant["fused"].items()}
    dense = {name for variant in variants for name in variant["dense"]}
    sparse = {name for variant in variants for name in variant["sparse"]} - dense
    return {"fused": fused, "sparse": sorted(sparse), "dense": sorted(dense)}


def examine(config: PretrainedConfig) -> Family:
    """Save a small model of a configuration, and say where vLLM puts each linear layer of its decoder blocks."""
    from sparse_serve.plugin.build import build

    with tempfile.TemporaryDirectory() as folder:
        model = tiny.save(config, Path(folder))
        headers = read_headers(Path(folder))
        stored = tensor_names(model, headers)
        built = build(Path(folder), {name: headers[name] for name in of_decoder(model, config, stored)})
    inside = in_blocks(model, config, stored)
    packable = {source for name in built.layers.keys() - built.read_directly for source in built.layers[name]}
    linears = stored_linears(model, stored)
    found: Family = {"fused": {}, "sparse": set(), "dense": set()}
    for name in linears | set(matrices(headers)):
        relative = inside(name)
        if relative is not None:
            found["sparse" if name in linears & packable else "dense"].add(relative)
    for name, sources in built.layers.items():
        if len(sources) > 1 and inside(sources[0]) is not None:
            found["fused"][last(name)] = [last(source) for source in sources]
    return found


class Pictures(MetaPathFinder, Loader):
    """Modules of any content in place of torchvision, where that is missing.

    Models that also see import it to prepare pictures, which no layer depends on.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for every module of torchvision."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that has every attribute."""
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def in_blocks(model: nn.Module, config: Any, stored: Mapping[str, Renamed]) -> Callable[[str], str | None]:
    """A function from a stored name to the name relative to its decoder block, expert numbers as "*"; None outside."""
    count = config.get_text_config().num_hidden_layers
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    weights = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in lists.items()
        if len(module) == count
    }
    blocks = re.compile(rf"{re.escape(max(weights, key=weights.__getitem__))}\.(\d+)\.")
    places = {
        name.partition(f".{match[1]}.")[0]
        for name, one in stored.items()
        if one.alone and (match := blocks.match(one.targets[0]))
    }
    prefix = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(places)))})\.\d+\.")

    def relative(name: str) -> str | None:
        match = prefix.match(name)
        return None if match is None else re.sub(r"\.\d+(?=\.|$)", ".*", name[match.end() :])

    return relative


def of_decoder(model: Any, config: Any, stored: Mapping[str, Renamed]) -> list[str]:
    """Stored tensors of the part that generates text: transformers does not write those of towers as it found them."""
    if config.get_text_config() is config:
        return list(stored)
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return [name for name, one in stored.items() if one.targets[0].startswith((f"{prefix}.", "lm_head"))]


def stored_linears(model: nn.Module, stored: Mapping[str, Renamed]) -> set[str]:
    """The linear layers of a model that are stored as they are, by their stored names."""
    linears = {name + WEIGHT_SUFFIX for name, module in model.named_modules() if is_linear(module)}
    return {name.removesuffix(WEIGHT_SUFFIX) for name, one in stored.items() if one.alone and one.targets[0] in linears}


def is_linear(module: nn.Module) -> bool:
    """Whether a module of transformers multiplies by a weight: `nn.Linear`, or GPT-2's transposed form of it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrices(headers: dict[str, TensorHeader]) -> Iterator[str]:
    """Modules, or parameters where these have names of their own, of which a tensor has two dimensions or more."""
    for name, header in headers.items():
        if len(header.shape) > 1:
            yield name.removesuffix(WEIGHT_SUFFIX)


def last(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

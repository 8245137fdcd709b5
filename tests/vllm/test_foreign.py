"""Checkpoints of other tools on real vLLM: the tokens that transformers computes from the weights they stand for.

One engine for each kind of values. What else there is becomes the same numbers (tests/maskgen/export/test_convert.py),
and what the server does with such a directory is in test_foreign_server.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.pattern import NMPattern
from maskgen.export.convert import convert
from sparse_serve.engine.vllm_flags import parse, resolve
from sparse_serve.runtime.conversion import Conversion
from tests import foreign_files, models
from tests.directories import edit_config, read_all
from tests.maskgen.export.test_convert import SHAPE, STORED, make_masked
from tests.vllm.offline import greedy, prompt_logprobs, serve, transformers_oracle


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    return make_masked(tmp_path / "masked")


def oracle(base: Path, weights: dict[str, Any]) -> tuple[list[list[int]], list[float]]:
    """What transformers says of an ordinary directory with these weights."""
    plain = Path(shutil.copytree(base, base.parent / "plain"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, plain / "model.safetensors")
    return transformers_oracle(plain)


@pytest.mark.parametrize("kind", ["bitmask-int8", "bitmask-fp8", "marlin-w4", "marlin-w8", "maskllm"])
def test_converted_and_served(kind: str, masked: Path, tmp_path: Path) -> None:
    source, masks = tmp_path / "source", None
    if kind == "maskllm":
        models.save("llama", source, **SHAPE)
        masks = tmp_path / "masks.npz"
        kept = {n: t.ne(0) for n, t in read_all(masked).items() if ".layers." in n and t.ndim == 2}
        foreign_files.maskllm_archive(kept, masks)
        meant = read_all(source)
        meant |= {name: meant[name] * mask for name, mask in kept.items()}
    else:
        meant = foreign_files.rewrite(masked, source, *STORED[kind][:2])
    convert(source, tmp_path / "sparse", NMPattern(2, 4), masks)
    tokens, logprobs = oracle(masked, meant)
    with serve(tmp_path / "sparse") as llm:
        stats = llm.collective_rpc("sparse_stats")
        assert prompt_logprobs(llm) == pytest.approx(logprobs, abs=2e-4)
        assert greedy(llm) == tokens
    assert sorted(stats[0]["sparse_names"]) == sorted(SparseCheckpoint.open(tmp_path / "sparse").config.targets)


def test_a_leftover_section_is_left_out(tmp_path: Path) -> None:
    """vLLM refuses it, and with the flag that the server adds it does not."""
    from vllm.engine.arg_utils import EngineArgs

    models.save("llama", tmp_path / "dense", **SHAPE)
    section = foreign_files.section("int-quantized", foreign_files.QUANTISED, foreign_files.LEFTOVER)
    section["config_groups"]["group_0"]["input_activations"] = foreign_files.ACTIVATIONS
    edit_config(tmp_path / "dense", lambda config: config.update(quantization_config=section))
    told: list[str] = []
    args = parse([str(tmp_path / "dense")], 0.0)
    resolve(args, Conversion(tell=told.append))
    assert args.model == str(tmp_path / "dense") and "leftover sparsity_config" in told[0]
    with pytest.raises(DeprecationWarning, match="Sparsity support has been removed"):
        EngineArgs(model=args.model).create_engine_config()
    config = EngineArgs(model=args.model, hf_overrides=args.hf_overrides).create_engine_config()
    assert config.model_config.quantization == "compressed-tensors"
    given = parse([str(tmp_path / "dense"), '--hf-overrides={"a": 1}'], 0.0)
    resolve(given, Conversion())
    assert given.hf_overrides.keys() == {"quantization_config", "a"}


@pytest.mark.parametrize("kind", ["bitmask-fp8", "marlin-w4"])
def test_a_name_in_a_file_of_flags_is_the_name(
    kind: str, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    foreign_files.rewrite(masked, tmp_path / "source", *STORED[kind][:2])
    (tmp_path / "flags.yaml").write_text("served-model-name: mine\n")
    for words, name in ((["--config", str(tmp_path / "flags.yaml")], "mine"), ([], "source")):
        args = parse([str(tmp_path / "source"), *words], 0.0)
        resolve(args, Conversion())
        assert args.served_model_name in (name, [name])
        assert Path(args.model).parent == tmp_path / "cache/sparse-serve/converted"
        assert (args.model_tag, args.load_format, args.dtype) == (args.model, "sparse_nm", "float32")

"""A model as GGUF: what two readers make of the file, and which models are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import Tokenizer

from maskgen.hf import gguf as reader
from sparse_serve.bench import gguf_model
from sparse_serve.runtime.errors import UnsupportedError
from tests import models

STEPS = {"q8_0": 1 / 127, "q4_0": 1 / 8}
"""Of a block's largest value: by how much neighbouring codes differ."""


@pytest.mark.parametrize("kind", gguf_model.KINDS)
def test_weights_come_back_as_close_as_the_codes_are(kind: str, tmp_path: Path) -> None:
    models.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    gguf_model.write(tmp_path / "dense", tmp_path / "tiny.gguf", kind)
    reader.convert(tmp_path / "tiny.gguf", tmp_path / "back")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == dense.keys()
    for name, weight in dense.items():
        if weight.ndim == 1:
            assert torch.equal(back[name], weight)
            continue
        step = STEPS[kind if ".layers." in name else "q8_0"]
        largest = weight.float().unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
        error = (back[name].float() - weight.float()).abs().unflatten(1, (-1, 32))
        # a value beyond the last code is a whole step off, and bfloat16 rounds once more
        assert (error <= (step + 2**-8) * largest).all(), name
        assert error.mean() > 0


def test_the_file_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    models.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    gguf_model.write(tmp_path / "dense", tmp_path / "tiny.gguf", "q4_0")
    file = GGUFReader(tmp_path / "tiny.gguf")
    said = {name: field.contents() for name, field in file.fields.items()}
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert (said["llama.block_count"], said["llama.vocab_size"]) == (models.LAYERS, models.VOCABULARY)
    assert said["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert said["llama.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    original = Tokenizer.from_file(str(tmp_path / "dense" / "tokenizer.json"))
    assert said["tokenizer.ggml.tokens"] == [original.id_to_token(number) for number in range(models.VOCABULARY)]
    assert said["tokenizer.ggml.token_type"][:3] == [3, 3, 1], "<s> and </s> are for control"
    first = next(tensor for tensor in file.tensors if tensor.name == "blk.0.attn_q.weight")
    assert first.tensor_type == GGMLQuantizationType.Q4_0
    rows = dequantize(first.data, first.tensor_type)
    weight = load_file(tmp_path / "dense" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    heads, width = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]
    neighbours = weight.float().view(heads, 2, width // 2, -1).transpose(1, 2).reshape(weight.shape)
    assert np.abs(rows - neighbours.numpy()).max() <= 0.13 * weight.abs().max()


def test_bos_is_added_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    models.save("llama", tmp_path / "dense")
    file = tmp_path / "dense" / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    for single, adds in (([{"Sequence": {}}], False), ([{"SpecialToken": {}}, {"Sequence": {}}], True)):
        file.write_text(json.dumps({**tokenizer, "post_processor": {"single": single}}), "utf-8")
        out = tmp_path / f"{adds}.gguf"
        gguf_model.write(tmp_path / "dense", out, "q8_0")
        assert GGUFReader(out).fields["tokenizer.ggml.add_bos_token"].contents() is adds


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PLAIN = {**LEVEL, "use_regex": False}
LLAMA_3 = {"type": "Split", "pattern": {"Regex": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"}}
QWEN_2 = {"type": "Split", "pattern": {"Regex": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"}}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (LEVEL, "gpt-2"),
        ({"pretokenizers": [DIGITS, LEVEL]}, "smollm"),
        ({"pretokenizers": [LLAMA_3, PLAIN]}, "llama-bpe"),
        ({"pretokenizers": [QWEN_2, PLAIN]}, "qwen2"),
        ({**LEVEL, "add_prefix_space": True}, None),
        ({"pretokenizers": [LLAMA_3, LEVEL]}, None),
        ({"pretokenizers": [{"type": "Split", "pattern": {"String": " "}}, PLAIN]}, None),
        ({"type": "Metaspace"}, None),
        (None, None),
    ],
)
def test_rules_that_cut_words_have_a_name_or_are_refused(rules: Any, name: str | None) -> None:
    if name is not None:
        assert gguf_model.words(rules) == name
        return
    with pytest.raises(UnsupportedError, match=r"without a name in llama\.cpp"):
        gguf_model.words(rules)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, r"architectures of config.json is \['Qwen2ForCausalLM'\]; only"),
        ({"attention_bias": True}, "attention_bias of config.json is True"),
        ({"hidden_act": "gelu"}, "hidden_act of config.json is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type of config.json is 'llama3'; only default"),
        ({"intermediate_size": 100}, r"rows of \[64, 100, 64\] weights; GGUF's blocks are of 32"),
        ({"head_dim": 12}, r"rows of \[64, 96, 48\] weights"),
    ],
)
def test_what_is_not_converted_is_said(change: dict[str, Any], message: str) -> None:
    gguf_model.check(LLAMA)
    with pytest.raises(UnsupportedError, match=message):
        gguf_model.check({**LLAMA, **change})


def test_a_tensor_of_another_architecture_is_refused() -> None:
    assert gguf_model.tensor_name("model.layers.7.mlp.up_proj.weight") == "blk.7.ffn_up.weight"
    for name in ("model.layers.7.mlp.experts.weight", "model.visual.weight", "model.layers.weight"):
        with pytest.raises(UnsupportedError, match="not one of a Llama"):
            gguf_model.tensor_name(name)


def test_a_missing_package_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="gguf is not installed; pip install"):
        gguf_model.write(tmp_path, tmp_path / "out.gguf", "q8_0")

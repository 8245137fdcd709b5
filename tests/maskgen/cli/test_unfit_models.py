"""What cannot be pruned is refused by name before anything is pruned, with what to do, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests import models
from tests.directories import edit_config
from tests.families import FAMILIES
from tests.maskgen.cli.test_parser import SMALL, run

ModelDir = Callable[..., Path]
SIZES: dict[str, Any] = {"vocab_size": models.VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
BERT = transformers.BertConfig(
    **SIZES, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
)
T5 = transformers.T5Config(**SIZES, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0)
TRAINED = [*SMALL, "--set", "train.window_tokens=32", "--set", "train.steps=1", "--set", "train.batch=1"]


def refused(capsys: pytest.CaptureFixture[str], out: Path, recipe: str, model: Path, *more: object) -> str:
    """The line that a run ends with; it has not begun."""
    code, _, errors = run(capsys, "run", recipe, "--model", model, "--out", out / "sparse", *more)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert not out.exists()
    return errors


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: transformers.BertForMaskedLM(BERT), "a BertForMaskedLM, expected a causal language model, which is a"),
        (lambda: transformers.BertModel(BERT), "a BertModel, expected a causal language model"),
        (
            lambda: transformers.LlamaForSequenceClassification(FAMILIES["llama"].config()),
            "a LlamaForSequenceClassification, expected a causal language model, which is a LlamaForCausalLM of this "
            "kind; start from the model that predicts the next token",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(T5),
            "start from a model that predicts the next token, such as",
        ),
    ],
)
def test_models_of_another_kind(
    make: Callable[[], nn.Module], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    models.tokenizer().save_pretrained(tmp_path / "model")
    capsys.readouterr()  # a bar of transformers
    for more in ([], ["--allow-unserved"]):
        assert words in refused(capsys, tmp_path / "made", "magnitude", tmp_path / "model", *more)


def test_a_model_that_sees_is_refused_and_its_language_model_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = FAMILIES["llama"].config()
    eyes = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    seeing = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=eyes))
    seeing.save_pretrained(tmp_path / "llava")
    models.tokenizer().save_pretrained(tmp_path / "llava")
    capsys.readouterr()
    line = refused(capsys, tmp_path / "made", "magnitude", tmp_path / "llava")
    assert "LlavaForConditionalGeneration is not supported" in line
    assert "its language model alone is supported: save that as a LlamaForCausalLM, with the tokenizer" in line

    alone = transformers.LlamaForCausalLM(text)
    alone.model, alone.lm_head = seeing.model.language_model, seeing.lm_head
    alone.save_pretrained(tmp_path / "alone")
    models.tokenizer().save_pretrained(tmp_path / "alone")
    code, _, errors = run(capsys, "run", "magnitude", "--model", tmp_path / "alone", "--out", tmp_path / "sparse")
    assert (code, (tmp_path / "sparse").exists()) == (0, True), errors


@pytest.mark.parametrize("verb", ["run", "inspect", "eval", "decompress", "quantise"])
def test_an_adapter_is_no_model(verb: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "r": 8}))
    save_file({"lora_A.weight": torch.zeros(8, 64)}, adapter / "adapter_model.safetensors")
    argv = {
        "run": ["magnitude", "--model", adapter, "--out", tmp_path / "out"],
        "inspect": [adapter],
        "eval": [adapter, "--data", text_file],
        "decompress": [adapter, "--out", tmp_path / "out"],
        "quantise": [adapter, "--values", "int8", "--out", tmp_path / "out"],
    }[verb]
    code, _, errors = run(capsys, verb, *argv)
    assert (code, errors.count("\n")) == (2, 1) and "adapter: an adapter of 'org/base', not a model; merge it" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_model_that_is_quantised_already(
    method: str, model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(model_dir(), tmp_path / "model")
    edit_config(model, lambda config: config.update(quantization_config={"quant_method": method, "bits": 4}))
    line = refused(capsys, tmp_path / "made", "magnitude", model)
    assert f"already has a quantization_config ('{method}'); start from the dense model" in line


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")]
)
@pytest.mark.parametrize("recipe", ["wanda", "proxsparse"])
def test_weights_in_a_dtype_that_is_not_pruned(
    recipe: str,
    dtype: torch.dtype,
    name: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(model_dir(), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, model / "model.safetensors")
    options = [*(TRAINED if recipe == "proxsparse" else SMALL), "--data", text_file]
    line = refused(capsys, tmp_path / "made", recipe, model, *options)
    assert f"is stored as {name}, expected one of ['BF16', 'F16', 'F32']: load the model" in line


@pytest.mark.parametrize("recipe", ["wanda", "proxsparse", "adaptive_sparse", "maskllm"])
def test_weights_that_are_no_numbers_are_named(
    recipe: str, model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, bad = shutil.copytree(model_dir(), tmp_path / "model"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[bad][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    options = [*(SMALL if recipe == "wanda" else TRAINED), "--data", text_file, "--out", tmp_path / "out"]
    code, _, errors = run(capsys, "run", recipe, "--model", model, *options)
    assert code == 2 and "model.layers.1.mlp.up_proj: weight: NaN or infinity" in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_neurons_that_cannot_be_removed(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_dir("llama", intermediate_size=97)
    options = [*TRAINED, "--data", text_file, "--out", tmp_path / "out"]
    code, _, errors = run(capsys, "run", "maskprune", "--model", model, *options)
    assert (code, errors.count("\n")) == (2, 1) and "no down_proj of this model is pruned" in errors

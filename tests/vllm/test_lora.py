"""LoRA adapters over sparse layers, against transformers on the masked model with the adapter merged in."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_serve.engine import vllm_adapters
from sparse_serve.runtime.errors import SettingsError
from tests.vllm.adapters import save_adapter, save_merged
from tests.vllm.offline import NEW_TOKENS, PROMPTS, make_sparse, serve, transformers_oracle


def test_requests_with_and_without_an_adapter_in_one_step(tmp_path: Path) -> None:
    """The adapter is over every linear layer, so that of the logits too. One slot, which is also the last: what vLLM's
    own CPU version takes for requests without an adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sparse, masked = make_sparse("llama", tmp_path)
    merged = save_merged(masked, tmp_path / "merged", save_adapter(masked, tmp_path / "adapter"))
    base_tokens, base_logprobs = transformers_oracle(masked)
    tokens, logprobs = transformers_oracle(merged)
    assert tokens != base_tokens
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS + PROMPTS]
    adapters = [None] * len(PROMPTS) + [LoRARequest("adapter", 1, str(tmp_path / "adapter"))] * len(PROMPTS)
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with serve(sparse, enable_lora=True, max_lora_rank=8) as llm:
        stats = llm.collective_rpc("sparse_stats")[0]
        answers = llm.generate(prompts, greedy, use_tqdm=False, lora_request=adapters)
        scores = llm.generate(prompts, scored, use_tqdm=False, lora_request=adapters)
    assert [list(answer.outputs[0].token_ids) for answer in answers] == base_tokens + tokens
    assert prompt_logprobs(scores) == pytest.approx(base_logprobs + logprobs, abs=2e-4)
    assert (stats["sparse_layers"], stats["dense_layers"]) == (12, 0), "each once, though vLLM wraps them"


def prompt_logprobs(outputs: list[Any]) -> list[float]:
    return [
        table[token].logprob
        for output in outputs
        for table, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    ]


ENABLED = SimpleNamespace(max_lora_rank=8)


def check(*adapters: tuple[str, Path | str], lora: Any = ENABLED, model: str = "Llama") -> None:
    from vllm.model_executor.model_loader import utils
    from vllm.model_executor.models.registry import ModelRegistry

    utils.get_model_cls = lambda config: ModelRegistry.models[f"{model}ForCausalLM"].load_model_cls()
    modules = [SimpleNamespace(name=name, path=str(path)) for name, path in adapters]
    args = Namespace(lora_modules=modules, served_model_name=["tiny"], model="DIR")
    vllm_adapters.check(args, SimpleNamespace(lora_config=lora, model_config=None))


def test_what_is_wrong_with_an_adapter_is_said_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    save_adapter(tmp_path, tmp_path / "good")
    save_adapter(tmp_path, tmp_path / "large", r=64)
    check(("a", tmp_path / "good"), ("b", "owner/of-the-hub"))
    check(lora=None)
    for adapter, lora, message in (
        (("a", tmp_path / "good"), None, r"--lora-modules a=.*good: needs --enable-lora"),
        (("tiny", tmp_path / "good"), ENABLED, "the served model has this name"),
        (("a", "/nowhere"), ENABLED, "a=/nowhere: not a directory; expected one with adapter_config.json"),
        (("a", tmp_path / "empty"), ENABLED, "a=.*empty: .*No such file.*adapter_config.json"),
        (("a", tmp_path / "large"), ENABLED, "a=.*large: LoRA rank 64 is greater than max_lora_rank 8"),
    ):
        with pytest.raises(SettingsError, match=message):
            check(adapter, lora=lora)


def test_a_model_that_vllm_has_no_adapters_for_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--enable-lora: vLLM has no LoRA for BloomForCausalLM; .*merge the adapt"):
        check(model="Bloom")

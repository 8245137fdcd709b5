"""Values to and from vLLM, on stand-ins with the attributes vLLM's have."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_serve.engine import DEFAULT_MAX_TOKENS, Constraint, ConstraintKind, FinishReason, KernelChoice, Sampling
from sparse_serve.engine.vllm_values import Outputs, constraint_arguments, engine_info, sampling_arguments, takes_chat


def test_the_requests_own_values_beat_the_models_defaults_even_when_zero() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "max_tokens": 7, "unknown": 1}
    arguments = sampling_arguments(Sampling(temperature=0.0), defaults, 100)
    assert (arguments["temperature"], arguments["top_p"], arguments["max_tokens"]) == (0.0, 0.9, 7)
    assert "unknown" not in arguments
    assert "top_k" not in arguments, "vLLM's own default is not ours to repeat"


@pytest.mark.parametrize(("asked", "given"), [(None, DEFAULT_MAX_TOKENS), (5, 5), (10**9, 100)])
def test_max_tokens_has_a_default_and_a_cap(asked: int | None, given: int) -> None:
    assert sampling_arguments(Sampling(max_tokens=asked), {}, 100)["max_tokens"] == given


def test_a_chat_needs_a_template_of_a_flag_or_of_the_tokenizer() -> None:
    with_template, without = SimpleNamespace(chat_template="{{ messages }}"), SimpleNamespace(chat_template=None)
    assert takes_chat(None, with_template) and takes_chat("file.jinja", without)
    assert not takes_chat(None, without) and not takes_chat(None, None)


@pytest.mark.parametrize("seed", [None, -(2**63), -2, 0, 7, 2**63 - 1])
def test_a_seed_is_handed_on(seed: int | None) -> None:
    assert sampling_arguments(Sampling(seed=seed), {}, 100)["seed"] == seed


def test_the_seed_that_vllm_takes_for_none_becomes_another() -> None:
    seed = sampling_arguments(Sampling(seed=-1), {}, 100)["seed"]
    assert -(2**63) <= seed < 2**63 and seed != -1


def logprob(value: float, rank: int) -> SimpleNamespace:
    return SimpleNamespace(logprob=value, rank=rank)


def completion(
    text: str, token_ids: list[int], reason: str | None, logprobs: Any = None, index: int = 0
) -> SimpleNamespace:
    return SimpleNamespace(text=text, token_ids=token_ids, finish_reason=reason, logprobs=logprobs, index=index)


def output(*completions: SimpleNamespace, prompt_logprobs: Any = None) -> SimpleNamespace:
    made = {"outputs": list(completions), "prompt_token_ids": [1, 2, 3], "prompt_logprobs": prompt_logprobs}
    return SimpleNamespace(**made, num_cached_tokens=2)


def test_outputs_become_chunks() -> None:
    logprobs = [
        {4: logprob(-0.5, 1), 7: logprob(-1.0, 2)},
        {9: logprob(-5.0, 30), 2: logprob(-0.1, 1), 3: logprob(-0.2, 2)},
    ]
    prompt_logprobs = [None, {2: logprob(-2, 5)}, {3: logprob(-3, 6)}]
    found = Outputs(Sampling(logprobs=2, prompt_logprobs=0), completion_tokens=10)
    (made,) = found.chunks(output(completion("xy", [4, 9], "length", logprobs), prompt_logprobs=prompt_logprobs))
    assert (made.text, made.token_ids, made.prompt_tokens, made.completion_tokens) == ("xy", (4, 9), 3, 12)
    assert (made.finish_reason, made.cached_prompt_tokens) == (FinishReason.LENGTH, 2)
    assert [(e.token.token_id, e.token.logprob) for e in made.logprobs] == [(4, -0.5), (9, -5.0)]
    assert [[t.token_id for t in e.top] for e in made.logprobs] == [[4, 7], [2, 3]], "best first, without the odd one"
    assert [(e.token.token_id, e.token.logprob, e.top) for e in made.prompt_logprobs] == [(2, -2, ()), (3, -3, ())]


def test_absent_log_probabilities_stay_absent() -> None:
    (made,) = Outputs(Sampling()).chunks(output(completion("", [4], None)))
    assert (made.finish_reason, made.logprobs, made.prompt_logprobs) == (None, (), ())


def test_sequences_are_counted_together_and_prompts_once() -> None:
    found = Outputs(Sampling(prompt_logprobs=0, n=2))
    prompt_logprobs = [None, {2: logprob(-2, 5)}, {3: logprob(-3, 6)}]
    both = [completion("a", [4], None, index=1), completion("b", [5], None, index=0)]
    first, second = found.chunks(output(*both, prompt_logprobs=prompt_logprobs))
    (third,) = found.chunks(output(completion("c", [6, 7], "stop", index=1)))
    assert [(chunk.index, chunk.completion_tokens) for chunk in (first, second, third)] == [(1, 1), (0, 2), (1, 4)]
    assert [len(chunk.prompt_logprobs) for chunk in (first, second, third)] == [2, 0, 0]
    assert 0 < first.first_token_s == third.first_token_s <= third.elapsed_s


@pytest.mark.parametrize(
    ("constraint", "arguments"),
    [
        (Constraint(ConstraintKind.CHOICE, ("a", "b")), {"choice": ["a", "b"]}),
        (Constraint(ConstraintKind.JSON_OBJECT), {"json_object": True}),
        (Constraint(ConstraintKind.REGEX, ("a+",)), {"regex": "a+"}),
    ],
)
def test_constraints_go_by_vllms_names(constraint: Constraint, arguments: dict[str, Any]) -> None:
    assert constraint_arguments(constraint) == arguments


def test_ranks_share_layers_and_stages_do_not() -> None:
    """Two stages of two tensor-parallel ranks. What a rank measured counts as far as the slowest of them."""

    def rank(layers: int, *choices: tuple[str, float]) -> dict[str, Any]:
        return {
            "sparse_layers": layers,
            "dense_layers": 1,
            "kernels": {"cpu": layers},
            "choices": [asdict(KernelChoice(64, 32, "float", 4, *choice)) for choice in choices],
            "sparse_weight_bytes": 9 * layers,
            "dense_equivalent_bytes": 16 * layers,
        }

    model = SimpleNamespace(max_model_len=128, dtype="torch.bfloat16", get_vocab_size=lambda: 256)
    ranks = [rank(3, ("cpu", 1.5)), rank(3, ("cpu", 1.2)), rank(2, ("cpu", 1.6)), rank(2, ("reference", 0.5))]
    info = engine_info("name", model, ranks, tensor_parallel=2)
    assert (info.sparse_layers, info.dense_layers, info.kernels) == (5, 2, {"cpu": 5})
    assert (info.sparse_weight_bytes, info.dense_equivalent_bytes) == (90, 160)
    assert {(choice.kernel, choice.speedup) for choice in info.choices} == {("cpu", 1.2), ("reference", 0.5)}

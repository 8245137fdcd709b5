"""Bounds of a request: everything with a number or a length has a limit, and the error names the field."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve.api import grpc_messages as messages
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine import FinishReason, Sampling
from sparse_serve.engine.fake import INFO
from sparse_serve.runtime.errors import BadRequestError, UnknownModelError
from sparse_serve.server.settings import Settings

SETTINGS = Settings(max_stop=2, max_stop_bytes=4, max_logprobs=5)
VOCAB = INFO.vocab_size
MODELS = ("fake", "second", "adapter")


def read(text: str = "a", model: str = "", **sampling: Any):
    return messages.read_request(
        pb.GenerateRequest(text=text, model=model, sampling=pb.Sampling(**sampling)), INFO, MODELS, SETTINGS
    )


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected 1 to"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 2.5}, "temperature is 2.5; expected a number from 0 to 2"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 2**32 - 1}, "top_k is"),
        ({"min_p": -0.5}, "min_p is"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"logprobs": 6}, "logprobs is 6; expected 0 to 5"),
        ({"prompt_logprobs": 6}, "prompt_logprobs is 6; expected 0 to 5"),
        ({"stop": ["a", "b", "c"]}, "stop has 3 entries; expected at most 2"),
        ({"stop": [""]}, "stop has a string of 0 bytes"),
        ({"stop": ["äää"]}, "stop has a string of 6 bytes; expected 1 to 4"),
        ({"stop_token_ids": [1, 2, 3]}, "stop_token_ids has 3 entries"),
        ({"stop_token_ids": [VOCAB]}, f"stop_token_ids has {VOCAB}; expected ids below"),
        ({"n": 0}, "n is 0; expected 1 to"),
        ({"n": 129}, "n is 129; expected 1 to 128"),
        ({"min_tokens": 2**32 - 1}, "min_tokens is"),
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias has {VOCAB}; expected ids below"),
        ({"logit_bias": {1: 101.0}}, "logit_bias has 101.0; expected numbers from -100 to 100"),
        ({"logit_bias": {1: math.nan}}, "logit_bias has nan"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias has 1025 entries"),
        ({"constraint": pb.Constraint()}, "constraint: give one of"),
        ({"constraint": pb.Constraint(json_object=False)}, "constraint: give one of"),
        ({"constraint": pb.Constraint(regex="")}, "constraint.regex is empty"),
        ({"constraint": pb.Constraint(regex="a" * 5000)}, "constraint.regex takes 5000 bytes; expected at most 4096"),
        ({"constraint": pb.Constraint(json_schema="{")}, "constraint.json_schema is no JSON"),
        ({"constraint": pb.Constraint(json_schema="[]")}, "constraint.json_schema is list in JSON"),
        ({"constraint": pb.Constraint(grammar="a" * 70_000)}, "constraint.grammar takes 70000 bytes"),
        ({"constraint": pb.Constraint(choice=pb.Choice())}, "constraint.choice: expected one text"),
        ({"constraint": pb.Constraint(choice=pb.Choice(texts=["a", ""]))}, "constraint.choice: expected one text"),
        ({"constraint": pb.Constraint(choice=pb.Choice(texts=["a"] * 2000))}, "constraint.choice has 2000 entries"),
    ],
)
def test_out_of_bounds_is_named(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        read(**sampling)


def test_limits_themselves_are_allowed() -> None:
    edge = {"max_tokens": 1, "temperature": 0, "top_p": 1, "min_p": 1, "presence_penalty": -2, "logprobs": 5}
    sampling = read(stop=["ää"], stop_token_ids=[VOCAB - 1, 0], **edge).sampling
    assert sampling.stop == ("ää",)
    assert sampling.stop_token_ids == (VOCAB - 1, 0)
    assert {name: getattr(sampling, name) for name in edge} == edge


def test_an_absent_sampling_is_all_defaults() -> None:
    assert messages.read_request(pb.GenerateRequest(text="a"), INFO, MODELS, SETTINGS).sampling == Sampling()


def test_the_prompt_is_given_once_and_is_not_empty() -> None:
    def read_prompt(**prompt: Any):
        return messages.read_request(pb.GenerateStreamRequest(**prompt), INFO, MODELS, SETTINGS).prompt

    assert read_prompt(text="hi") == "hi"
    assert read_prompt(token_ids=pb.TokenIds(ids=[0, VOCAB - 1])) == (0, VOCAB - 1)
    for prompt, message in (
        ({}, "give text or token_ids"),
        ({"text": ""}, "text is empty"),
        ({"token_ids": pb.TokenIds()}, "token_ids: 0 tokens"),
        ({"token_ids": pb.TokenIds(ids=[1] * INFO.max_model_len)}, f"expected 1 to {INFO.max_model_len - 1}"),
        ({"token_ids": pb.TokenIds(ids=[VOCAB])}, f"token_ids has {VOCAB}"),
    ):
        with pytest.raises(BadRequestError, match=message):
            read_prompt(**prompt)


@pytest.mark.parametrize("name", ["", *MODELS])
def test_every_served_name_may_be_asked_for(name: str) -> None:
    assert read(model=name).model == name


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownModelError, match="'other' is not served here; expected one of: 'fake', 'second', 'adap"):
        read(model="other")


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_seed_is_a_seed(seed: int) -> None:
    assert read(seed=seed).sampling.seed == seed


def test_every_finish_reason_has_a_value_of_its_own() -> None:
    values = [messages._REASONS[reason] for reason in (None, *FinishReason)]
    assert sorted(values) == sorted(pb.FinishReason.values())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_named_error(data: bytes) -> None:
    """Whatever a peer sends, reading it ends in a bounded request or in one of our errors."""
    message = pb.GenerateRequest()
    try:
        message.ParseFromString(data)
    except Exception:
        return
    try:
        request = messages.read_request(message, INFO, MODELS, SETTINGS)
    except (BadRequestError, UnknownModelError) as error:
        assert str(error)
        return
    assert request.sampling.temperature is None or 0 <= request.sampling.temperature <= 2
    assert len(request.sampling.stop) <= 2

"""Requests from plain Python values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from sparse_serve.api.pb.v1 import chat_pb2, tokens_pb2
from sparse_serve.api.pb.v1 import generation_pb2 as pb


class Sampling(TypedDict, total=False):
    """How tokens are chosen and when to stop, as `Sampling` of generation.proto says; one of the last five at most."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logprobs: int
    prompt_logprobs: int
    n: int
    logit_bias: Mapping[int, float]
    min_tokens: int
    json_schema: str | Mapping[str, Any]
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str


class Message(TypedDict, total=False):
    """One message of a conversation, as in the OpenAI API; `tool_calls` are those of an answer before."""

    role: str
    content: str
    tool_calls: Sequence[chat_pb2.ToolCall]
    tool_call_id: str
    name: str


class Tool(TypedDict, total=False):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]


def sampling(options: Mapping[str, Any]) -> pb.Sampling:
    """The message for `Sampling`. `TypeError` for an unknown option, `ValueError` for a value that has no place."""
    given = dict(options)
    kinds = ("json_schema", "json_object", "regex", "choice", "grammar")
    held_to = {kind: given.pop(kind) for kind in kinds if kind in given}
    if len(held_to) > 1:
        raise ValueError(f"{' and '.join(held_to)}: an answer can be held to one of them")
    if unknown := sorted(set(given) - {field.name for field in pb.Sampling.DESCRIPTOR.fields}):
        raise TypeError(f"{unknown[0]} is no option of a request; known: {', '.join(Sampling.__annotations__)}")
    message = pb.Sampling(**given)
    for kind, value in held_to.items():
        if kind == "choice":
            message.constraint.choice.texts.extend(value)
        else:
            text = json.dumps(value) if isinstance(value, Mapping) else value
            setattr(message.constraint, kind, text)
    return message


def generation(kind: Any, prompt: str | Sequence[int], model: str, priority: int, options: Mapping[str, Any]) -> Any:
    """A request of this kind: `GenerateRequest` or `GenerateStreamRequest`."""
    request = kind(model=model, priority=priority, sampling=sampling(options))
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


def chat(
    kind: Any,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    tool_choice: str,
    model: str,
    options: Mapping[str, Any],
) -> Any:
    """A request of this kind: `ChatRequest` or `ChatStreamRequest`."""
    return kind(
        messages=[chat_pb2.Message(**message) for message in messages],
        tools=map(_tool, tools),
        tool_choice=tool_choice,
        sampling=sampling(options),
        model=model,
    )


def _tool(tool: Tool) -> chat_pb2.Tool:
    parameters = json.dumps(tool["parameters"]) if "parameters" in tool else ""
    return chat_pb2.Tool(name=tool["name"], description=tool.get("description", ""), parameters=parameters)


def score(passages: Sequence[str | Sequence[int]], model: str) -> tokens_pb2.ScoreRequest:
    """A request for scores of texts and of token ids."""
    return tokens_pb2.ScoreRequest(passages=_passages(passages), model=model)


def embed(passages: Sequence[str | Sequence[int]], model: str) -> tokens_pb2.EmbedRequest:
    """A request for embeddings of texts and of token ids."""
    return tokens_pb2.EmbedRequest(passages=_passages(passages), model=model)


def _passages(passages: Sequence[str | Sequence[int]]) -> list[tokens_pb2.Passage]:
    return [
        tokens_pb2.Passage(text=passage)
        if isinstance(passage, str)
        else tokens_pb2.Passage(token_ids=pb.TokenIds(ids=passage))
        for passage in passages
    ]

"""The service `sparse_serve.v1.ChatService`: conversations, answered by the engine as over HTTP.

A message becomes a request of the OpenAI API and the answer a message again, so that chat template, tools and reasoning
are vLLM's own on both APIs.
"""

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from sparse_serve.api.grpc_calls import Answering, Calls
from sparse_serve.api.grpc_messages import check_json, check_model, read_sampling
from sparse_serve.api.pb.v1 import chat_pb2 as pb
from sparse_serve.api.pb.v1 import chat_pb2_grpc, generation_pb2
from sparse_serve.engine import ConstraintKind, Sampling
from sparse_serve.runtime.errors import BadRequestError
from sparse_serve.server.body_limits import BodyLimits, body_limits

SERVICE = pb.DESCRIPTOR.services_by_name["ChatService"].full_name
_SAME_NAME = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "n",
)  # fmt: skip
_CHOICES = ("auto", "none", "required")


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """The calls of `proto/sparse_serve/v1/chat.proto`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Chat(self, request: pb.ChatRequest, call: Any) -> pb.ChatResponse:
        """All of it at once."""
        async with self._calls.answering("Chat", call) as answering:
            (whole,) = [answer async for answer in self._chat(request, answering, False)]
            answer = pb.ChatResponse(choices=map(_choice, whole["choices"]), usage=_usage(whole["usage"]))
        return answer  # noqa: RET504  what goes wrong while it is made is answered, too

    async def ChatStream(self, request: pb.ChatStreamRequest, call: Any) -> None:
        """Message by message."""
        async with (
            self._calls.answering("ChatStream", call) as answering,
            contextlib.aclosing(self._chat(request, answering, True)) as pieces,
        ):
            async for piece in pieces:
                for choice in piece["choices"]:
                    await self._calls.write(answering, _piece(choice))
                if piece.get("usage") and not piece["choices"]:
                    await self._calls.write(answering, pb.ChatStreamResponse(usage=_usage(piece["usage"])))

    async def _chat(
        self, request: pb.ChatRequest | pb.ChatStreamRequest, answering: Answering, stream: bool
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        context = self._calls.context
        info = context.generating()
        check_model(request.model, context.engine.models)
        sampling = read_sampling(request.sampling, info, context.settings)
        body = _body(request, sampling, body_limits(context.settings)) | {"model": request.model or info.model}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        with self._calls.share(answering.call, sampling.n):
            async with contextlib.aclosing(context.engine.chat(body, answering.origin)) as answers:
                async for answer in answers:
                    yield answer


def _body(request: pb.ChatRequest | pb.ChatStreamRequest, sampling: Sampling, limits: BodyLimits) -> dict[str, Any]:
    """A request of the OpenAI API. Raises `BadRequestError` for what it has no place for."""
    if not request.messages:
        raise BadRequestError("messages is empty; give one or more", "messages")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(sampling, name) is not None:
            raise BadRequestError(f"sampling.{name}: not in a chat; use Generate", f"sampling.{name}")
    body: dict[str, Any] = {"messages": list(map(_message, request.messages))}
    body |= {name: value for name in _SAME_NAME if (value := getattr(sampling, name)) is not None}
    body |= {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_token_ids)}
    body |= {"ignore_eos": sampling.ignore_eos, "min_tokens": sampling.min_tokens}
    if sampling.logit_bias:
        body["logit_bias"] = {str(id_): value for id_, value in sampling.logit_bias.items()}
    if sampling.constraint is not None:
        kind, texts = sampling.constraint.kind, list(sampling.constraint.texts)
        held_to: Any = texts if kind is ConstraintKind.CHOICE else texts[0] if texts else True
        body["structured_outputs"] = {kind.value: held_to}
    return body | _tools(request, limits)


def _tools(request: pb.ChatRequest | pb.ChatStreamRequest, limits: BodyLimits) -> dict[str, Any]:
    tools = []
    for tool in request.tools:
        function = {"name": tool.name, "description": tool.description}
        if tool.parameters:
            function["parameters"] = check_json("tools.parameters", tool.parameters)
        tools.append({"type": "function", "function": function})
    choice = request.tool_choice
    if choice and choice not in (*_CHOICES, *(tool.name for tool in request.tools)):
        raise BadRequestError(
            f"tool_choice is {choice!r}; expected auto, none, required, or the name of a tool", "tool_choice"
        )
    if not tools:
        return {}
    limits.check_tools(tools)
    named = {"type": "function", "function": {"name": choice}}
    return {"tools": tools, "tool_choice": (choice if choice in _CHOICES else named) if choice else "auto"}


def _message(message: pb.Message) -> dict[str, Any]:
    if not message.role:
        raise BadRequestError("messages: role is empty; expected system, user, assistant or tool", "messages.role")
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": one.id,
                "type": "function",
                "function": {"name": one.name, "arguments": one.arguments},
            }
            for one in message.tool_calls
        ]
    for name in ("tool_call_id", "name"):
        if value := getattr(message, name):
            made[name] = value
    return made


def _choice(choice: Mapping[str, Any]) -> pb.ChatChoice:
    said = choice["message"]
    message = pb.Message(role="assistant", content=said.get("content") or "", tool_calls=_calls(said))
    return pb.ChatChoice(
        message=message, reasoning=said.get("reasoning") or "", finish_reason=choice["finish_reason"] or ""
    )


def _piece(choice: Mapping[str, Any]) -> pb.ChatStreamResponse:
    delta = choice["delta"]
    return pb.ChatStreamResponse(
        index=choice["index"],
        content=delta.get("content") or "",
        reasoning=delta.get("reasoning") or "",
        tool_calls=_calls(delta),
        finish_reason=choice.get("finish_reason") or "",
    )


def _calls(said: Mapping[str, Any]) -> list[pb.ToolCall]:
    return [
        pb.ToolCall(
            id=made.get("id") or "",
            name=function.get("name") or "",
            arguments=function.get("arguments") or "",
            index=made.get("index", number),
        )
        for number, made in enumerate(said.get("tool_calls") or [])
        for function in (made.get("function") or {},)  # a piece may have none
    ]


def _usage(usage: Mapping[str, Any]) -> generation_pb2.Usage:
    details = usage.get("prompt_tokens_details") or {}
    return generation_pb2.Usage(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage.get("completion_tokens") or 0,
        cached_prompt_tokens=details.get("cached_tokens") or 0,
    )

"""Small HTTP servers that speak OpenAI's completions API as vLLM, an older server or llama.cpp, and break in every way.

As a program (`python -m tests.sparse_serve.gate.servers N`) it prints its address and is killed while it answers the
N-th completion.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]
"""From a request to a status and a body."""

Stream = Callable[[dict[str, Any]], Iterator[bytes]]
"""From a request that asks for a stream to what is sent, piece by piece."""


def tokens(body: dict[str, Any]) -> Iterator[bytes]:
    """As many tokens as are asked for, then how many there were."""
    for _ in range(body["max_tokens"]):
        yield b'data: {"choices": [{"text": " the"}]}\n\n'
    usage = {"prompt_tokens": 1, "completion_tokens": body["max_tokens"]}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
    yield b"data: [DONE]\n\n"


def first_tokens(body: dict[str, Any]) -> Iterator[bytes]:
    """Two tokens, and the connection ends as if that were all."""
    yield from itertools.islice(tokens(body), 2)


def fails_in_the_stream(body: dict[str, Any]) -> Iterator[bytes]:
    """Two tokens, then an error of the server."""
    yield from itertools.islice(tokens(body), 2)
    yield b'data: {"error": {"message": "out of memory", "code": 500}}\n\ndata: [DONE]\n\n'


def of_vllm(worse: float = 0.0, change: Callable[[dict[str, Any]], object] = lambda choice: None) -> Answer:
    """Tokens are characters; each has log-probability -1 - `worse`, and another one the rest of the probability."""

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        ids, actual = list(map(ord, body["prompt"])), -1 - worse
        other = math.log(1 - math.exp(actual))
        entries = [{str(id_): _entry(id_, actual), str(id_ + 1): _entry(id_ + 1, other)} for id_ in ids[1:]]
        choice = {"prompt_logprobs": [None, *entries], "prompt_token_ids": ids, "text": "x"}
        change(choice)
        return 200, json.dumps({"choices": [choice]}).encode()

    return answer


def of_openai(body: dict[str, Any]) -> tuple[int, bytes]:
    """Knows `echo` only; the token it generates comes last."""
    if not body.get("echo"):
        return 200, json.dumps({"choices": [{"text": "x", "logprobs": None}]}).encode()
    tokens = [*body["prompt"], "x"]
    found = {
        "tokens": tokens,
        "token_logprobs": [None, *[-1.0] * (len(tokens) - 1)],
        "top_logprobs": [None, *({token: -1.0, "other": -0.5} for token in tokens[1:])],
    }
    return 200, json.dumps({"choices": [{"text": "x", "logprobs": found}]}).encode()


def of_lm_eval(body: dict[str, Any]) -> tuple[int, bytes]:
    """Answers prompts of token ids, as lm_eval sends them; an even token is twice as likely as an odd one."""
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    choices = []
    for index, ids in enumerate(prompts):
        logprobs = [math.log(0.5 if id_ % 2 == 0 else 0.25) for id_ in [*ids, 0]]
        found = {
            "tokens": [str(id_) for id_ in [*ids, 0]],
            "token_logprobs": [None, *logprobs[1:]],
            "top_logprobs": [None, *({"x": value} for value in logprobs[1:])],
        }
        choices.append({"index": index, "text": "x", "logprobs": found})
    return 200, json.dumps({"choices": choices}).encode()


_BYTES = 0x110000
"""Ids from here on are single bytes of characters that have no token of their own."""


def of_llama_cpp(body: dict[str, Any]) -> tuple[int, bytes]:
    """llama.cpp's `/v1/completions`: what it does not know, and `echo`, it takes without a word."""
    found = {"content": [{"id": 120, "token": "x", "bytes": [120], "logprob": -1.0, "top_logprobs": []}]}
    choice = {"text": "x", "index": 0, "logprobs": found if "logprobs" in body else None, "finish_reason": "length"}
    return 200, json.dumps({"choices": [choice], "object": "text_completion"}).encode()


def llama_cpp(
    worse: float = 0.0, change: Callable[[list[dict[str, Any]]], object] = lambda entries: None
) -> dict[str, Answer]:
    """Its other routes. Tokens are characters, or bytes of a character that is rare; each that is generated has
    log-probability -1 - `worse`, and another one the rest of the probability."""

    def tokenize(body: dict[str, Any]) -> tuple[int, bytes]:
        assert body["add_special"] and body["with_pieces"]
        found: list[dict[str, Any]] = []
        for one in body["content"]:
            if ord(one) < 0x10000:
                found.append({"id": ord(one), "piece": one})
            else:
                found += [{"id": _BYTES + byte, "piece": [byte]} for byte in one.encode()]
        return 200, json.dumps({"tokens": found}).encode()

    def completion(body: dict[str, Any]) -> tuple[int, bytes]:
        ids = [int(id_) for id_ in re.findall(r"<\[(\d+)\]>", body["grammar"])]
        assert all(isinstance(id_, int) for id_ in body["prompt"]) and len(ids) == body["n_predict"]
        if max(ids) >= _BYTES:
            error = {"code": 500, "message": "got exception: Unexpected empty grammar stack", "type": "server_error"}
            return 500, json.dumps({"error": error}).encode()
        entries = [_generated(id_, -1 - worse, body["n_probs"]) for id_ in ids]
        change(entries)
        return 200, json.dumps({"content": "", "completion_probabilities": entries}).encode()

    return {"/tokenize": tokenize, "/completion": completion}


def _generated(token: int, logprob: float, count: int) -> dict[str, Any]:
    other = {"id": token + 1, "token": _text(token + 1), "logprob": math.log(1 - math.exp(logprob))}
    found = {"id": token, "token": _text(token), "bytes": [], "logprob": logprob}
    if count < 1000:
        return {**found, "top_logprobs": [found, other][:count]}
    bytes_ = [{"id": _BYTES + byte, "token": "\ufffd", "logprob": -7.0} for byte in range(256)]
    return {**found, "top_logprobs": [{**other, "logprob": -0.5}, *bytes_, {**found, "logprob": -9.0}]}


def _text(token: int) -> str:
    return chr(token) if token < _BYTES else "\ufffd"


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"logprob": logprob, "rank": 1, "decoded_token": chr(token)}


class _Server(ThreadingHTTPServer):
    def __init__(self, answer: Answer, stream: Stream, cut: int | None, routes: Mapping[str, Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stream, self.cut, self.routes = stream, cut, {"/v1/completions": answer, **routes}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.send(200, b'{"total_slots": 2}' if self.path == "/props" else b'{"data": [{"id": "m"}]}', None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "m"
        if not body.get("stream"):
            answer = self.server.routes.get(self.path, lambda body: (404, b"no such path"))
            return self.send(*answer(body), self.server.cut)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()  # the end of the connection is the end of the answer
        for piece in self.server.stream(body):
            self.wfile.write(piece)
            self.wfile.flush()
        return None

    def send(self, status: int, value: bytes, cut: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value[:cut])

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def server(
    answer: Answer, cut: int | None = None, stream: Stream = tokens, routes: Mapping[str, Answer] = MappingProxyType({})
) -> Iterator[str]:
    """The address of a server; with `cut`, of one whose answers end after so many bytes. `routes` are its others."""
    listener = _Server(answer, stream, cut, routes)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield listener.url
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


@contextmanager
def killed_at(request: int) -> Iterator[str]:
    """The address of a server in a process of its own, which is killed while it answers so many completions later."""
    command = [sys.executable, "-m", __name__, str(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
            assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()


def _main(request: int) -> None:
    asked, whole = itertools.count(1), of_vllm()

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        if next(asked) == request:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(body)

    def stream(body: dict[str, Any]) -> Iterator[bytes]:
        is_last = next(asked) == request
        for piece in tokens(body):
            yield piece
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)

    listener = _Server(answer, stream, None, {})
    sys.stdout.write(f"{listener.url}\n")
    sys.stdout.flush()
    listener.serve_forever()


if __name__ == "__main__":
    _main(int(sys.argv[1]))

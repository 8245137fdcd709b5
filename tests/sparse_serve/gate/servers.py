"""Small HTTP servers that speak OpenAI's completions API as vLLM or as an older server, and break in every way.

As a program (`python -m tests.sparse_serve.gate.servers N`) it prints its address and is killed while it answers the
N-th completion.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"logprob": logprob, "rank": 1, "decoded_token": chr(token)}


class _Server(ThreadingHTTPServer):
    def __init__(self, answer: Answer, stream: Stream, cut: int | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.stream, self.cut = answer, stream, cut

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.send(200, b'{"data": [{"id": "m"}]}', None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "m"
        if not body.get("stream"):
            return self.send(*self.server.answer(body), self.server.cut)
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
def server(answer: Answer, cut: int | None = None, stream: Stream = tokens) -> Iterator[str]:
    """The address of a server; with `cut`, of one whose answers end after so many bytes."""
    listener = _Server(answer, stream, cut)
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
            assert process.wait(10) == -signal.SIGKILL
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

    listener = _Server(answer, stream, None)
    sys.stdout.write(f"{listener.url}\n")
    sys.stdout.flush()
    listener.serve_forever()


if __name__ == "__main__":
    _main(int(sys.argv[1]))

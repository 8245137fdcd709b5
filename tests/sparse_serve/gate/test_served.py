"""Two servers by URL: log-probabilities over HTTP, tokens compared, and everything that can go wrong on the way."""

import json
import math
import re
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sparse_serve.cli.main import main
from sparse_serve.gate import GateConfig, Verdict, report_file, run, served, tasks
from sparse_serve.gate.endpoint import Endpoint
from sparse_serve.gate.task_pack import Sample
from sparse_serve.runtime.errors import GateError, SettingsError
from tests.sparse_serve.gate.servers import Answer, killed_at, llama_cpp, of_llama_cpp, of_openai, of_vllm, server

OTHER_TOKENS = r"make different tokens of piece 0, from token \d+ on \('' and '!'; (\d+) and \d+ tokens in all\)"
NO_LOGPROBS = "returns no log-probabilities of a prompt.*only `speed` and tasks"
TEXT = " ".join(f"word{number % 17}" for number in range(900))


def config(base: str, candidate: str, tmp_path: Path, **quality: Any) -> GateConfig:
    (tmp_path / "a.txt").write_text(TEXT)
    more = {"texts": [str(tmp_path / "a.txt")], "window_tokens": 50, **quality}
    return GateConfig.of({"version": 1, "base": {"url": base}, "candidate": {"url": candidate}, "quality": more})


@pytest.mark.parametrize(("worse", "verdict"), [(0.0, Verdict.PASS), (0.02, Verdict.PASS), (0.2, Verdict.FAIL)])
def test_two_servers_are_gated(worse: float, verdict: Verdict, tmp_path: Path) -> None:
    with server(of_vllm()) as base, server(of_vllm(worse)) as candidate:
        report = run(config(base, candidate, tmp_path, max_kl=0.01, max_flips=0.1))
    assert report.verdict is verdict
    assert {result.check for result in report.results} == {"quality", "divergence"}
    (text,) = report.evidence.texts
    assert text.base.served.value == pytest.approx(math.e)
    assert text.candidate.served.value == pytest.approx(math.exp(1 + worse))
    assert text.divergence is not None and text.divergence.agreement == 1.0
    p, q = math.exp(-1), math.exp(-1 - worse)
    assert text.divergence.kl == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), abs=1e-9)
    assert json.loads(report.to_json())["evidence"]["texts"][0]["divergence"]["exact"] is False
    assert len(text.base.served.nll_per_window) == len(served.pieces(TEXT, 150, None)) > 8


def test_a_server_that_only_echoes_is_gated_too(tmp_path: Path) -> None:
    with server(of_openai) as base, server(of_openai) as candidate:
        report = run(config(base, candidate, tmp_path, max_flips=0.0))
    assert report.verdict is Verdict.PASS
    with server(of_openai) as url, Endpoint(url) as endpoint:
        assert endpoint.score("abc", 2).tokens == ("a", "b", "c")


def test_a_server_that_echoes_and_one_that_names_ids_are_compared_by_text(tmp_path: Path) -> None:
    with server(of_openai) as base, server(of_vllm(0.02)) as candidate:
        report = run(config(base, candidate, tmp_path, max_kl=0.5))
    assert report.verdict is Verdict.PASS
    (text,) = report.evidence.texts
    assert text.divergence is not None and text.divergence.kl > 0


@pytest.mark.parametrize(("worse", "verdict"), [(0.02, Verdict.PASS), (0.2, Verdict.FAIL)])
def test_llama_cpp_is_gated_against_vllm(worse: float, verdict: Verdict, tmp_path: Path) -> None:
    """A text as its generation, with the same tokens, numbers and divergence as one that is read."""
    with server(of_vllm()) as base, server(of_llama_cpp, routes=llama_cpp(worse)) as candidate:
        report = run(config(base, candidate, tmp_path, max_kl=0.01))
        assert run(config(candidate, candidate, tmp_path)).verdict is Verdict.PASS
    assert report.verdict is verdict
    (text,) = report.evidence.texts
    assert text.candidate.served.value == pytest.approx(math.exp(1 + worse))
    p, q = math.exp(-1), math.exp(-1 - worse)
    assert text.divergence is not None
    assert text.divergence.kl == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), abs=1e-9)


def test_llama_cpp_is_asked_for_no_more_texts_at_a_time_than_it_has_slots() -> None:
    routes, slots, waited = llama_cpp(), threading.Semaphore(2), []

    def completion(body: dict[str, Any]) -> tuple[int, bytes]:
        waited.append(not slots.acquire(blocking=False))
        time.sleep(0.01)
        slots.release()
        return routes["/completion"](body)

    with server(of_llama_cpp, routes=routes | {"/completion": completion}) as url, Endpoint(url) as endpoint:
        assert len(endpoint.score_all(["a text"] * 12, 5)) == 12
    assert waited == [False] * 12


def test_characters_of_several_tokens_are_looked_up_in_the_whole_vocabulary() -> None:
    with server(of_llama_cpp, routes=llama_cpp()) as url, Endpoint(url) as endpoint:
        found = endpoint.score("a\U0001f993b", 5)
        assert found.logprobs == (-7.0, -7.0, -7.0, -7.0, -1.0)
        assert found.tokens == ("", "", "", "", "", "b")
        assert found.ids == (97, *(0x110000 + byte for byte in "\U0001f993".encode()), 98)
        assert all(len(top) <= 6 and id_ in top for top, id_ in zip(found.top, found.ids[1:], strict=True))


def test_every_kind_of_server_answers_a_task() -> None:
    sample = Sample("a", (" b", " longer"), 0)
    for answer, routes in ((of_vllm(), {}), (of_openai, {}), (of_llama_cpp, llama_cpp())):
        with server(answer, routes=routes) as url, Endpoint(url) as endpoint:
            assert tasks.correct([sample], endpoint) == [True]


def generates_others(entries: list[dict[str, Any]]) -> None:
    entries[3]["id"] += 1


def stops_early(entries: list[dict[str, Any]]) -> None:
    entries.pop()


def knows_no_number(entries: list[dict[str, Any]]) -> None:
    entries[3]["logprob"] = None


def is_certain(entries: list[dict[str, Any]]) -> None:
    """As llama.cpp would say of a token that is not among its candidates."""
    entries[3]["logprob"] = 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (generates_others, "or not of all its tokens"),
        (stops_early, "or not of all its tokens"),
        (knows_no_number, "or not of all its tokens"),
        (is_certain, "none of one distribution"),
    ],
)
def test_a_llama_cpp_that_breaks_is_an_error(change: Any, message: str) -> None:
    asked = 0

    def only_later(entries: list[dict[str, Any]]) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            change(entries)

    for how, before in ((change, 0), (only_later, 1)):
        with server(of_llama_cpp, routes=llama_cpp(change=how)) as url, Endpoint(url) as endpoint:
            for _ in range(before):
                endpoint.score("a text", 5)
            with pytest.raises(GateError, match=message):
                endpoint.score("a text", 5)


def drop_last(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"].pop()


def not_a_number(choice: dict[str, Any]) -> None:
    next(iter(choice["prompt_logprobs"][5].values()))["logprob"] = math.nan


def infinite(choice: dict[str, Any]) -> None:
    next(iter(choice["prompt_logprobs"][5].values()))["logprob"] = -math.inf


def other_token(choice: dict[str, Any]) -> None:
    choice["prompt_token_ids"][7] += 1


def without_ids(choice: dict[str, Any]) -> None:
    del choice["prompt_token_ids"]


def logits(choice: dict[str, Any]) -> None:
    for value in choice["prompt_logprobs"][5].values():
        value["logprob"] = 0.0


def least(choice: dict[str, Any]) -> None:
    next(iter(choice["prompt_logprobs"][5].values()))["logprob"] = -3.4028234663852886e38


def fails_in_the_middle() -> Answer:
    good, asked = of_vllm(), [0]

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        asked[0] += 1
        return (500, b"out of memory") if asked[0] >= 5 else good(body)

    return answer


BROKEN: dict[str, tuple[Answer, int | None, str]] = {
    "500 in the middle": (fails_in_the_middle(), None, "status 500: 'out of memory'"),
    "cut off": (of_vllm(), 400, "RemoteProtocolError"),
    "no JSON": (lambda body: (200, b"<html>"), None, "is no JSON"),
    "no object": (lambda body: (200, b"[]"), None, "expected an object"),
    "no choices": (lambda body: (200, b'{"choices": []}'), None, "has no choices"),
    "NaN": (of_vllm(change=not_a_number), None, "a log-probability in its answer is nan"),
    "infinite": (of_vllm(change=infinite), None, "a log-probability in its answer is -inf"),
    "fewer": (of_vllm(change=drop_last), None, "not of all its tokens"),
    "without ids": (of_vllm(change=without_ids), None, "not of all its tokens"),
    "no log-probabilities": (lambda body: (200, b'{"choices": [{"text": "x"}]}'), None, NO_LOGPROBS),
    "llama.cpp without its routes": (of_llama_cpp, None, NO_LOGPROBS),
    "refuses": (lambda body: (400, b"unknown argument"), None, f"status 400: 'unknown argument'.*{NO_LOGPROBS[-20:]}"),
    "logits": (of_vllm(change=logits), None, "are none of one distribution"),
    "underflow": (of_vllm(change=least), None, r"a log-probability in its answer is -3\.4"),
    "other tokens": (lambda body: of_vllm()({**body, "prompt": body["prompt"] + "!"}), None, OTHER_TOKENS),
    "another token": (of_vllm(change=other_token), None, "not of all its tokens|make different tokens"),
}


def assert_error(out: Path, message: str) -> None:
    """The reports say so, too: in their JSON, and to a build server."""
    report = report_file.load(out / "report.json")
    (result,) = report["results"]
    assert (report["verdict"], result["check"], result["verdict"]) == ("error", "measurement", "error")
    assert re.search(message, result["summary"])
    suite = ElementTree.parse(out / "junit.xml").getroot()
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")


@pytest.mark.parametrize("how", BROKEN)
def test_a_server_that_breaks_is_an_error_never_a_verdict(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, cut, message = BROKEN[how]
    with server(of_vllm()) as base, server(answer, cut) as candidate:
        asked = config(base, candidate, tmp_path)
        with pytest.raises(GateError, match=message):
            run(asked)
        (tmp_path / "gate.yaml").write_text(asked.model_dump_json(exclude_none=True))  # YAML has JSON in it
        assert main(["gate", "run", str(tmp_path / "gate.yaml"), "--out", str(tmp_path / "out")]) == 3
    assert "sparse-serve: error: " in capsys.readouterr().err
    assert_error(tmp_path / "out", message)


def test_a_server_that_is_killed_in_the_middle_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real process, by SIGKILL, after it has answered a few."""
    for role in ("base", "candidate"):
        with server(of_vllm()) as whole, killed_at(5) as killed:
            addresses = (whole, killed) if role == "candidate" else (killed, whole)
            (tmp_path / "gate.yaml").write_text(config(*addresses, tmp_path).model_dump_json(exclude_none=True))
            assert main(["gate", "run", str(tmp_path / "gate.yaml"), "--out", str(tmp_path / "out")]) == 3
        assert f"sparse-serve: error: {killed}/v1/completions: " in capsys.readouterr().err
        assert_error(tmp_path / "out", killed)


def test_a_server_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with server(of_vllm()) as base, server(of_vllm()) as gone:
        asked = config(base, gone, tmp_path)
    with server(of_vllm()) as base, pytest.raises(GateError, match="ConnectError"):
        run(asked.model_copy(update={"base": config(base, base, tmp_path).base}))


def test_the_key_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with ExitStack() as stack:
        endpoint = stack.enter_context(Endpoint(stack.enter_context(server(of_vllm())) + "/v1"))
        assert endpoint._client.headers["authorization"] == "Bearer secret"
        assert endpoint.model == "m"
        assert len(endpoint.score("hello", 1).logprobs) == 4


def test_pieces_are_the_text() -> None:
    cut = served.pieces(TEXT, 100, None)
    assert TEXT.startswith("".join(cut))
    assert all(80 < len(piece) <= 100 for piece in cut)
    assert served.pieces(TEXT, 100, 3) == cut[:3]
    assert served.pieces("short", 100, None) == ["short"]
    assert served.pieces("x" * 250, 100, None) == ["x" * 100, "x" * 100]


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\x00", "is no plain text"), (b" \n", "is empty")])
def test_what_is_no_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        served.read_pieces(tmp_path / "a.txt", 10, None)


def test_merged_divergence_is_a_lower_bound() -> None:
    p, q = [0.5, 0.3, 0.15, 0.05], [0.3, 0.4, 0.1, 0.2]
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    tops = [{at: math.log(value) for at, value in enumerate(values)} for values in (p, q)]
    assert served.merged_kl(*tops) == pytest.approx(exact)
    for kept in ({0, 1}, {0}, {2}, set()):
        left, right = ({at: top[at] for at in kept} for top in tops)
        assert 0 <= served.merged_kl(left, right) <= exact

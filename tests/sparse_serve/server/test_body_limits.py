"""What one request may ask for."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve.runtime.errors import BadRequestError
from sparse_serve.server.body_limits import BodyLimits

LIMITS = BodyLimits(
    max_sequences=8, max_grammar_bytes=200, max_regex_bytes=50, max_choices=4, max_stop=3, max_stop_bytes=10
)


def check(**asked: Any) -> int:
    return LIMITS.check(json.dumps(asked).encode())


@pytest.mark.parametrize(
    ("asked", "sequences"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": "a", "n": 8}, 8),
        ({"prompt": ["a"] * 4, "n": 2}, 8),
        ({"prompt": list(range(1000)), "n": 3}, 3),
        ({"prompt": [[1, 2], [3]], "n": 3}, 6),
        ({"input": ["a"] * 4}, 4),
        ({"input": [[1, 2], [3]]}, 2),
        ({"input": [{"role": "user", "content": "a"}] * 50}, 1),
        ({"messages": [{"role": "user", "content": "a"}] * 50, "n": 2}, 2),
        ({"prompt": None, "input": ["a"] * 4}, 4),
        ({"messages": [[{"role": "user", "content": "a"}]] * 4}, 4),
        ({"prompt": "a", "n": None}, 1),
        ({"prompt": "a", "n": -5}, 1),
        ({"prompt": [], "n": 2}, 2),
        ({"prompt": "a", "n": "many"}, 1),
        ({"prompt": "a", "n": "8"}, 8),
        ({"prompt": "a", "n": 4.0}, 4),
    ],
)
def test_sequences_are_prompts_times_n(asked: dict[str, Any], sequences: int) -> None:
    assert check(**asked) == sequences


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": "a", "n": 9}, "1 prompts with n = 9 are 9 sequences"),
        ({"prompt": ["a"] * 1024, "n": 128}, "131072 sequences; expected at most 8"),
        ({"prompt": [[1]] * 9}, "9 sequences"),
        ({"n": 10**30}, "sequences"),
        ({"request_id": "a\nERROR forged"}, "request_id"),
        ({"request_id": "y" * 65}, "request_id .* 65 characters"),
        ({"request_id": ""}, "request_id"),
        ({"stop": ["a"] * 4}, "stop has 4 entries; expected at most 3"),
        ({"stop": "a" * 11}, "stop has a string of more than 10 bytes"),
        ({"bad_words": ["ü" * 6]}, "bad_words"),
        ({"stop_token_ids": [1, 2, 3, 4]}, "stop_token_ids"),
        ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias has 1025"),
        ({"structured_outputs": {"choice": ["a"] * 5}}, "choice has 5 entries; expected at most 4"),
        ({"structured_outputs": {"choice": ["a" * 300]}}, "choice takes 304 bytes"),
        ({"structured_outputs": {"regex": "a" * 51}}, "regex takes 51 bytes; expected at most 50"),
        ({"structured_outputs": {"json": {"enum": ["a" * 300]}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "a" * 201}}, "structured_outputs.json"),
        ({"structured_outputs": {"grammar": "a" * 201}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "a" * 201}}, "structured_outputs.structural_tag"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": "a" * 201}}}, "response_format"),
        ({"text": {"format": {"schema": "a" * 201}}}, "text"),
        ({"tools": [{"function": {"description": "a" * 900}}]}, "tools take"),
    ],
)
def test_what_is_too_much_is_named_with_its_limit(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        check(**asked)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b'"a"', b"\xff\xfe", b'{"prompt": NaN'])
def test_what_is_no_json_object_is_for_the_application_to_refuse(body: bytes) -> None:
    assert LIMITS.check(body) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("prompt", "n", "stop", "stop_token_ids", "logit_bias", "request_id", "structured_outputs", "tools", "text")


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_object_is_counted_or_refused(asked: dict[str, Any]) -> None:
    with contextlib.suppress(BadRequestError):
        assert 1 <= check(**asked) <= 8


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_no_other_way_to_write_it_goes_through(encoding: str) -> None:
    """The application takes all of these."""
    text = '{"user": "\\ud800", "x": ' + "[" * 200 + "]" * 200 + ', "n": "9"}'
    with pytest.raises(BadRequestError, match="9 sequences"):
        LIMITS.check(text.encode(encoding))


def test_what_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(BadRequestError, match="nested too deeply"):
        LIMITS.check(b'{"x": ' + b"[" * 100_000)


def test_a_lone_surrogate_is_counted_as_something() -> None:
    assert LIMITS.check(b'{"prompt": "a", "stop": "\\ud800", "structured_outputs": {"regex": "\\ud800"}}') == 1

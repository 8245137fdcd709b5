"""The table of answers."""

import logging

import grpc
import pytest

from maskgen.core.errors import SparseError
from sparse_serve.runtime import errors


@pytest.mark.parametrize(
    ("error", "code", "status", "may_pass"),
    [
        (errors.BadRequestError("top_p is 2"), "INVALID_ARGUMENT", 400, False),
        (errors.UnknownModelError("model x"), "NOT_FOUND", 404, False),
        (errors.OverloadedError("full"), "RESOURCE_EXHAUSTED", 503, True),
        (errors.UnavailableError("draining"), "UNAVAILABLE", 503, True),
        (errors.EngineDiedError("gone"), "UNAVAILABLE", 503, True),
    ],
)
def test_our_errors_are_told_as_they_are(error: Exception, code: str, status: int, may_pass: bool) -> None:
    answer = errors.answer(error)
    assert (answer.grpc_code, answer.http_status, answer.message) == (code, status, str(error))
    assert (answer.retry_s is not None) is may_pass
    assert hasattr(grpc.StatusCode, answer.grpc_code)


@pytest.mark.parametrize("error", [RuntimeError("secret"), ValueError("secret"), errors.SettingsError("secret")])
def test_everything_else_is_an_id_in_the_answer_and_a_traceback_in_the_log(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        first, second = errors.answer(error), errors.answer(error)
    assert (first.grpc_code, first.http_status, first.retry_s) == ("INTERNAL", 500, None)
    assert "secret" not in first.message
    assert first.message != second.message
    assert caplog.records[0].exc_info[1] is error
    assert caplog.records[0].args[0] in first.message


def test_every_error_is_ours_and_a_standard_one() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServeError)]
    assert len(kinds) > 5
    for kind in kinds:
        assert issubclass(kind, SparseError)
        if kind is not errors.ServeError:
            standard = [base for base in kind.__mro__ if base.__module__ == "builtins"]
            assert standard[0] not in (Exception, BaseException), f"{kind} is no more specific than Exception"

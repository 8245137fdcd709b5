"""Requests: what is legal, what is converted, and one line for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

import maskgen
from maskgen.api import requests
from maskgen.core.errors import RequestError
from maskgen.core.perplexity import Protocol
from maskgen.train.loop import Cadence

KINDS = [
    kind
    for kind in vars(requests).values()
    if isinstance(kind, type) and issubclass(kind, requests.Request) and not kind.__name__.startswith("_")
]
LEAST = {"recipe": "wanda", "model": "m", "out": "o", "data": "d", "masks": "k", "values": "int8", "runs": "r"}


def least(kind: type[requests.Request]) -> dict[str, object]:
    """A value for every field that has no default."""
    return {name: LEAST[name] for name, field in kind.model_fields.items() if field.is_required()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_request_is_frozen_and_strict(kind: type[requests.Request]) -> None:
    request = kind(**least(kind))
    name = next(iter(kind.model_fields), None)
    if name is not None:
        with pytest.raises(ValueError, match="frozen"):
            setattr(request, name, "other")
    with pytest.raises(RequestError, match=rf"^{kind.__name__}: no field 'recipee'; known fields are \["):
        kind(**least(kind), recipee="wanda")
    for missing in least(kind):
        rest = {name: value for name, value in least(kind).items() if name != missing}
        with pytest.raises(RequestError, match=f"^`{missing}` is missing from {kind.__name__}; give it$"):
            kind(**rest)


def test_paths_may_be_strings_and_one_file_stands_for_a_list() -> None:
    request = maskgen.PruneRequest(recipe="wanda", model=Path("m"), data="d.txt", out="o", prior="p")
    assert (request.model, request.data, request.out) == ("m", (Path("d.txt"),), Path("o"))
    assert request.prior == Path("p")
    several = maskgen.PruneRequest(recipe="wanda", model="m", data=["a", Path("hf:org/name")], out="o")
    assert several.data == (Path("a"), Path("hf:org/name"))


def test_overrides_are_a_mapping_or_strings() -> None:
    values = {"method.damp": 0.05, "method.update": False, "ignore": ["*.o_proj"], "method.name": "é😀"}
    request = maskgen.PruneRequest(recipe="x", model="m", out="o", overrides=values)
    assert request.overrides == (
        "method.damp=0.05",
        "method.update=false",
        'ignore=["*.o_proj"]',
        'method.name="é😀"',
    )
    assert maskgen.PruneRequest(recipe="x", model="m", out="o", overrides="a=1").overrides == ("a=1",)
    with pytest.raises(RequestError, match=r"^`overrides` .*values must be numbers, strings, booleans or lists of"):
        maskgen.PruneRequest(recipe="x", model="m", out="o", overrides={"method.damp": Path("x")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, "`micro_batch` 0: input should be greater than or equal to 1"),
        ({"eval_every": 1.5}, "`eval_every` 1.5: input should be a valid integer"),
        ({"shard": "perhaps"}, "`shard` 'perhaps': input should be a valid boolean"),
        ({"out": 3}, "`out` 3: input is not a valid path"),
        ({"recipe": None}, "`recipe` None: input should be a valid string"),
        ({"model": 3}, "`model` 3: input should be a valid string"),
        ({"data": 3}, "`data` 3: input should be a valid tuple"),
    ],
)
def test_values_that_are_not_legal_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        maskgen.LearnRequest(**{"recipe": "maskllm", "model": "m", "out": "o", **changes})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_defaults_are_those_of_what_does_the_work() -> None:
    wanted = maskgen.EvaluateRequest(model="m", data="d")
    protocol = Protocol(stride_tokens=wanted.stride_tokens, max_windows=wanted.max_windows)
    assert protocol == Protocol() and wanted.window_tokens is wanted.bos is None
    learn = maskgen.LearnRequest(recipe="maskllm", model="m", out="o")
    assert Cadence(learn.micro_batch, keep_checkpoints=learn.keep_checkpoints) == Cadence()

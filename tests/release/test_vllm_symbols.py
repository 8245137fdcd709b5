"""Every symbol of vLLM that the code uses is where it is expected, and takes what it is given.

Found by reading sources (`vllm_uses`), so that the same can be asked of wheels that cannot run here
(docs/versions.md); and that reading finds what it should is tested on small packages called `vllm`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.release import vllm_uses
from tests.release.vllm_tree import Tree
from tests.release.vllm_uses import Use

INSTALLED = vllm_uses.installed()


def test_the_installed_vllm_has_every_symbol_that_is_used() -> None:
    uses = vllm_uses.relevant(INSTALLED)
    symbols = {use.symbol for use in uses}
    assert {
        "vllm.v1.engine.async_llm.AsyncLLM.from_vllm_config",
        "vllm.model_executor.layers.linear.LinearMethodBase.create_weights",
        "vllm.v1.engine.detokenizer.FastIncrementalDetokenizer",
        "vllm.entrypoints.launchers.cli_args.make_arg_parser",
    } <= symbols, "the collection lacks what the code certainly uses"
    assert vllm_uses.problems(INSTALLED, uses) == []


def test_a_method_of_ours_that_replaces_none_is_no_use() -> None:
    names = {use.member for use in vllm_uses.relevant(INSTALLED) if use.override is not None}
    assert "create_weights" in names and "check_all_attached" not in names


def vllm(folder: Path, **files: str) -> Tree:
    """A package `vllm` of these modules."""
    for name, text in {"__init__": "", **files}.items():
        path = folder / "vllm" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Tree(folder)


CALL = Use("here", "vllm.a", "f", call=ast.parse("f(1, flag=2)", mode="eval").body)  # type: ignore[arg-type]
METHOD = Use("here", "vllm.a", "A", "m", override=ast.parse("def m(self, x, *, deep=0): ...").body[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("use", "text", "found"),
    [
        (CALL, "def f(x, flag=None): ...", None),
        (CALL, "def f(x, **more): ...", None),
        (CALL, "async def f(*all, flag): ...", None),
        (CALL, "def g(x): ...", "here: no vllm.a.f"),
        (CALL, "def f(x): ...", "here: vllm.a.f takes no flag"),
        (CALL, "def f(*, flag): ...", "here: vllm.a.f takes 0 positional arguments, not 1"),
        (CALL, "def f(x, flag, more): ...", "here: vllm.a.f wants more, too"),
        (CALL, "class f:\n x: int\n flag: int", None),
        (CALL, "class f:\n x: int", "here: vllm.a.f takes no flag"),
        (METHOD, "class A:\n def m(self, x): ...", None),
        (METHOD, "class B:\n def m(self, x): ...\nclass A(B): ...", None),
        (METHOD, "class A: ...", "here: no vllm.a.A.m"),
        (METHOD, "class A:\n def m(self, x, y): ...", "ours takes ['deep', 'x']"),
        (METHOD, "class A:\n def m(self): ...", "is called with []"),
    ],
)
def test_what_a_vllm_lacks_is_found(use: Use, text: str, found: str | None, tmp_path: Path) -> None:
    problem = vllm_uses.problem(use, vllm(tmp_path, a=text))
    assert problem is None if found is None else found in str(problem)


@pytest.mark.parametrize(
    "text",
    [
        "from vllm.b import f",
        "from .b import g as f",
        "from vllm.b import *",
        "import typing\nif typing.TYPE_CHECKING:\n from .b import f\ndef __getattr__(name): ...",
        "try:\n from vllm.b import f\nexcept ImportError:\n f = None",
    ],
)
def test_names_are_followed_through_imports(text: str, tmp_path: Path) -> None:
    tree = vllm(tmp_path, a=text, b="def g(x, flag): ...\ndef f(x, flag): ...")
    assert vllm_uses.problem(CALL, tree) is None
    broken = vllm(tmp_path, a=text, b="def g(x): ...\ndef f(x): ...")
    assert vllm_uses.problem(CALL, Tree(broken.root)) == "here: vllm.a.f takes no flag"


def test_a_new_abstract_method_is_found(tmp_path: Path) -> None:
    text = "import abc\nclass A(abc.ABC):\n def m(self, x): ...\n @abc.abstractmethod\n def n(self): ..."
    assert vllm_uses.problems(vllm(tmp_path, a=text), [METHOD]) == ["vllm.a.A: nothing here implements n"]

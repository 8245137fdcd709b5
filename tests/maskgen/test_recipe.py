"""Recipes: what is accepted, what the digest covers, and that every mistake is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from maskgen import recipe
from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.sparsegpt import SparseGPT

MINIMAL = '[method]\nname = "sparsegpt"\n'


def test_shipped_recipes_are_complete() -> None:
    assert {"magnitude", "wanda", "sparsegpt", "sparsegpt-mask-only"} <= set(recipe.names())
    for name in recipe.names():
        loaded = recipe.load(name)
        assert loaded.pattern == NMPattern(2, 4)
        loaded.build_method()
    assert recipe.load("sparsegpt-mask-only").build_method() == SparseGPT(update=False)


def test_defaults_are_resolved_so_spelling_them_out_changes_nothing() -> None:
    spelled_out = (
        'pattern = "2:4"\nignore = []\n[method]\nname = "sparsegpt"\nblock = 128\ndamp = 0.01\nupdate = true\n'
        "[calibration]\nsamples = 128\nwindow_tokens = 2048\nseed = 0\nbatch = 8\n"
    )
    settled = recipe.parse(MINIMAL).for_context(4096)
    assert settled == recipe.parse(spelled_out)
    assert settled.digest() == recipe.parse(spelled_out).digest()
    assert settled.digest().startswith("sha256:")


@pytest.mark.parametrize(("limit", "expected"), [(None, 2048), (131072, 2048), (2048, 2048), (1024, 1024), (1, 1)])
def test_the_window_follows_the_model_unless_it_is_given(limit: int | None, expected: int) -> None:
    for name in recipe.names():
        settled = recipe.load(name).for_context(limit)
        assert settled.calibration.window_tokens == expected
        assert settled == recipe.load(name, [f"calibration.window_tokens={expected}"])
    given = recipe.load("wanda", ["calibration.window_tokens=512"])
    assert given.for_context(limit) == given


@pytest.mark.parametrize(
    "override",
    [
        "pattern=4:8",
        "method.damp=0.02",
        "method.name=wanda",
        "ignore=['*.o_proj']",
        "calibration.samples=1",
        "calibration.window_tokens=64",
        "calibration.seed=1",
        "calibration.batch=2",
    ],
)
def test_every_value_is_in_the_digest(override: str) -> None:
    if override == "method.name=wanda":
        assert recipe.load("wanda").digest() != recipe.load("sparsegpt").digest()
    else:
        assert recipe.parse(MINIMAL, overrides=[override]).digest() != recipe.parse(MINIMAL).digest()


def test_overrides_apply_in_order_and_reach_the_method() -> None:
    loaded = recipe.load("sparsegpt", ["method.damp=1", "method.damp=0.5", "pattern=1:4", 'ignore=["a.*", "b"]'])
    assert loaded.build_method() == SparseGPT(damp=0.5)
    assert loaded.pattern == NMPattern(1, 4)
    assert loaded.ignore == ("a.*", "b")


def test_a_recipe_file_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    assert recipe.load(str(path)) == recipe.parse(MINIMAL)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        recipe.parse(MINIMAL).ignore = ("x",)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n" + MINIMAL, r"unknown key x; known keys are \['calibration', 'ignore', 'method', 'pattern'\]"),
        (MINIMAL + "[calibration]\nfoo = 1\n", r"unknown key calibration\.foo; known keys are \['batch', 'samples'"),
        (MINIMAL + "dmp = 1\n", r"method\.dmp: sparsegpt has no such option.*\['block', 'damp', 'update'\]"),
        (MINIMAL + 'damp = "a"\n', r"method\.damp: 'a' is a str, expected a float"),
        (MINIMAL + "block = 1.5\n", r"method\.block: 1\.5 is a float, expected a int"),
        (MINIMAL + "update = 1\n", r"method\.update: 1 is a int, expected a bool"),
        (MINIMAL + "damp = -1\n", r"method\.damp -1\.0: expected a positive number"),
        ('[method]\nname = "nope"\n', r"no 'nope' in methods; expected one of \['magnitude', "),
        ('[method]\nname = "../recipe"\n', r"no '\.\./recipe' in methods"),
        ("[method]\ndamp = 1\n", "method: expected a table with a name"),
        ('method = "wanda"\n', "method: expected a table with a name"),
        ("", "method: field required"),
        ('pattern = "4:2"\n' + MINIMAL, "pattern 4:2"),
        ('pattern = "4:8"\n' + MINIMAL + "block = 12\n", r"method\.block 12: not a multiple of 8"),
        ("pattern = 24\n" + MINIMAL, "pattern 24"),
        ("ignore = 3\n" + MINIMAL, "ignore: "),
        ("ignore = [3]\n" + MINIMAL, r"ignore\.0: "),
        (MINIMAL + "[calibration]\nsamples = 0\n", r"calibration\.samples: .*greater than or equal to 1"),
        (MINIMAL + '[calibration]\nsamples = "8"\n', r"calibration\.samples: .*integer"),
        (MINIMAL + "[calibration]\nseed = true\n", r"calibration\.seed: "),
        ("pattern = \n", "not valid TOML"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.parse(text, "recipe test")
    assert str(caught.value).startswith("recipe test: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["method.damp", "=1", "method.name.x=1", "calibration..x=1"])
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(RecipeError):
        recipe.load("sparsegpt", [override])


def test_unknown_recipe_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'sparse'; shipped recipes are \['magnitude', "):
        recipe.load("sparse")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(str(tmp_path / "absent.toml"))
    (tmp_path / "latin.toml").write_bytes(b"pattern = '\xff'")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(str(tmp_path / "latin.toml"))

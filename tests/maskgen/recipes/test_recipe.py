"""Recipes: what is accepted, what the digest covers, and that every mistake is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import LearnedMethod
from maskgen.methods.oneshot.admm import ADMM
from maskgen.methods.oneshot.sparsegpt import SparseGPT
from maskgen.recipes import recipe
from maskgen.recipes.sections import Training

MINIMAL = '[method]\nname = "sparsegpt"\n'
LEARNED = '[method]\nname = "maskllm"\n[prior]\nname = "sparsegpt"\nupdate = false\n[train]\nsteps = 7\n'
ONE_SHOT_DIGEST = "sha256:c1823ad803fe3cc8433745a17ae98939ea49be54e581ac34d183dc5851c237f4"


def test_shipped_recipes_are_complete() -> None:
    assert {"magnitude", "wanda", "sparsegpt", "sparsegpt-mask-only", "maskllm"} <= set(recipe.names())
    for name in recipe.names():
        loaded = recipe.load(name)
        assert loaded.pattern == NMPattern(2, 4)
        loaded.build_method()
    assert recipe.load("sparsegpt-mask-only").build_method() == SparseGPT(update=False)


def test_defaults_are_resolved_so_spelling_them_out_changes_nothing() -> None:
    spelled_out = (
        'pattern = "2:4"\nignore = []\n[method]\nname = "sparsegpt"\nblock = 128\ndamp = 0.01\nupdate = true\n'
        "[calibration]\nsamples = 64\nwindow_tokens = 512\nseed = 0\nbatch = 8\n"
    )
    settled = recipe.parse(MINIMAL).for_context(4096)
    assert settled == recipe.parse(spelled_out)
    assert settled.digest() == recipe.parse(spelled_out).digest()
    assert settled.digest().startswith("sha256:")


@pytest.mark.parametrize(
    ("limit", "expected", "trained"),
    [(None, 512, 2048), (131072, 512, 2048), (2048, 512, 2048), (1024, 512, 1024), (256, 256, 256), (2, 2, 2)],
)
def test_the_window_follows_the_model_unless_it_is_given(limit: int | None, expected: int, trained: int) -> None:
    for text in (MINIMAL, LEARNED):
        settled = recipe.parse(text).for_context(limit)
        assert settled.calibration.window_tokens == expected
        overrides = [f"calibration.window_tokens={expected}"]
        if settled.train is not None:
            assert settled.train.window_tokens == trained
            overrides.append(f"train.window_tokens={trained}")
        assert settled == recipe.parse(text, overrides=overrides)
    given = recipe.load("wanda", ["calibration.window_tokens=300"])
    assert given.for_context(limit) == given


def test_the_digest_of_a_one_shot_recipe_knows_nothing_of_training() -> None:
    """Recipes from before there were learned methods keep their digest."""
    settled = recipe.parse(MINIMAL, overrides=["calibration.samples=128", "calibration.window_tokens=2048"])
    assert set(settled.resolved()) == {"pattern", "method", "calibration", "ignore"}
    assert settled.digest() == ONE_SHOT_DIGEST


def test_a_learned_method_is_trained_with_defaults_unless_the_recipe_says_otherwise() -> None:
    loaded = recipe.parse(LEARNED)
    assert loaded.train == Training(steps=7) and isinstance(loaded.build_method(), LearnedMethod)
    bare = recipe.parse('[method]\nname = "maskllm"\n')
    assert bare.train == Training() and bare.prior is None
    spelled_out = recipe.parse('[method]\nname = "maskllm"\n[train]\nsteps = 300\ndtype = "auto"\n')
    assert bare.digest() == spelled_out.digest() != loaded.digest()


def test_the_prior_is_a_one_shot_recipe_of_its_own() -> None:
    loaded = recipe.parse(LEARNED, overrides=["calibration.samples=5", "pattern=4:8", "ignore=['*.o_proj']"])
    alone = '[method]\nname = "sparsegpt"\nupdate = false\n'
    same = recipe.parse(alone, overrides=["calibration.samples=5", "pattern=4:8", "ignore=['*.o_proj']"])
    prior = loaded.prior_recipe()
    assert prior == same and prior is not None and prior.digest() == same.digest()
    assert prior.local_method() == SparseGPT(update=False)
    assert recipe.parse(MINIMAL).prior_recipe() is None


def test_another_method_does_not_inherit_the_options_of_the_recipes_own() -> None:
    """But those of other overrides, in any order; naming the same method changes nothing."""
    other = recipe.load("best-effort", ["prior.block=64", "prior.name=sparsegpt"])
    assert other.prior is not None and other.prior.build() == SparseGPT(block=64)
    assert recipe.load("sparsegpt", ["method.name=admm"]).build_method() == ADMM()
    assert recipe.load("admm", ["method.name=admm"]) == recipe.load("admm")
    with pytest.raises(RecipeError, match=r"method\.damp: wanda has no such option"):
        recipe.load("sparsegpt", ["method.name=wanda", "method.damp=0.1"])


def test_layers_of_a_symmetric_recipe_do_not_make_up_for_each_other() -> None:
    assert recipe.load("admm").symmetric() == recipe.load("admm", ["method.asymmetric=false"])
    assert recipe.load("wanda").symmetric() == recipe.load("wanda")


def test_a_prior_without_a_use_is_no_part_of_the_recipe() -> None:
    without = recipe.parse('[method]\nname = "maskllm"\nprior_strength = 0\n[train]\nsteps = 7\n')
    dropped = recipe.parse(LEARNED, overrides=["method.prior_strength=0"])
    assert dropped.prior is None and dropped == without and dropped.digest() == without.digest()


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
        "prior.damp=0.02",
        "train.steps=8",
        "train.scope=all",
        "train.noise_samples=2",
    ],
)
def test_every_value_is_in_the_digest(override: str) -> None:
    if override.startswith(("train.", "prior.")):
        assert recipe.parse(LEARNED, overrides=[override]).digest() != recipe.parse(LEARNED).digest()
    elif override == "method.name=wanda":
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
        (
            "x = 1\n" + MINIMAL,
            r"unknown key x; known keys are \['budget', 'calibration', 'ignore', 'method', 'pattern', 'prior', ",
        ),
        (MINIMAL + "[calibration]\nfoo = 1\n", r"unknown key calibration\.foo; known keys are \['batch', 'samples'"),
        (MINIMAL + "dmp = 1\n", r"method\.dmp: sparsegpt has no such option.*\['block', 'damp', 'update'\]"),
        (MINIMAL + 'damp = "a"\n', r"method\.damp: 'a' is a str, expected a float"),
        (MINIMAL + "block = 1.5\n", r"method\.block: 1\.5 is a float, expected a int"),
        (MINIMAL + "update = 1\n", r"method\.update: 1 is a int, expected a bool"),
        (MINIMAL + "damp = -1\n", r"method\.damp -1\.0: expected a positive number"),
        ('[method]\nname = "nope"\n', r"no 'nope' in methods; expected one of \[.*'magnitude', "),
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
        (MINIMAL + "[train]\n", r"\[train\]: sparsegpt is a one-shot method and has no use for it"),
        (MINIMAL + '[prior]\nname = "wanda"\n', r"\[prior\]: sparsegpt is a one-shot method"),
        (LEARNED.replace("sparsegpt", "maskllm").replace("update", "init_noise"), "prior.name: maskllm is learned"),
        (
            LEARNED.replace('"sparsegpt"\nupdate = false', '"admm"\nmask = "prior"'),
            "prior.name: admm with these options starts from a mask itself",
        ),
        (LEARNED.replace("update", "updte"), r"prior\.updte: sparsegpt has no such option"),
        (LEARNED.replace('name = "sparsegpt"\n', ""), "prior: expected a table with a name"),
        (LEARNED + "stps = 8\n", r"unknown key train\.stps; known keys are \['batch', 'blocks', 'clip', "),
        (LEARNED + "lr = 0\n", r"train\.lr: .*greater than 0"),
        (LEARNED + "batch = 2\nnoise_samples = 3\n", r"train\.noise_samples 3: more than the 2 windows of a step"),
        (LEARNED + 'scope = "some"\n', r"train\.scope: "),
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
    with pytest.raises(RecipeError, match=r"no recipe 'sparse'; shipped recipes are \[.*'magnitude', "):
        recipe.load("sparse")
    with pytest.raises(RecipeError, match=r"absent\.toml: cannot be read: No such file or directory$"):
        recipe.load(str(tmp_path / "absent.toml"))
    (tmp_path / "latin.toml").write_bytes(b"pattern = '\xff'")
    with pytest.raises(RecipeError, match=r"not UTF-8 text .*; convert it to UTF-8"):
        recipe.load(str(tmp_path / "latin.toml"))

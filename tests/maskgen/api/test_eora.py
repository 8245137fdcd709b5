"""`eora` from a request to a checkpoint: what stays, what is added, where the dense model is found, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import LowRankCorrection, PooledCorrection
from maskgen.core.errors import DataError, FormatError, ModelError, OutputExistsError, RecipeError, RequestError
from maskgen.core.quality import Quality
from maskgen.hf import model
from maskgen.methods import Drift
from maskgen.methods.correction.eora import EoRA
from maskgen.recipes.recipe import RECIPE_FILE
from tests import models
from tests.directories import read_all

ModelDir = Callable[..., Path]
RANK = 6
SHORT: dict[str, Any] = {"calibration.window_tokens": 32, "calibration.samples": 6, "method.rank": RANK}


@pytest.fixture
def places(model_dir: ModelDir, tmp_path: Path) -> Path:
    """A dense model, and beside it what is sparse: `sparse`, and the same with int8 values."""
    shutil.copytree(model_dir("llama", dtype=torch.bfloat16), tmp_path / "dense")
    maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=tmp_path / "dense", out=tmp_path / "sparse"))
    maskgen.quantise(maskgen.QuantiseRequest(model=tmp_path / "sparse", values="int8", out=tmp_path / "int8"))
    return tmp_path


def request(places: Path, text: Path | None, **changes: Any) -> maskgen.LearnRequest:
    given = {"prior": places / "sparse", "out": places / "out", "data": () if text is None else text, **changes}
    return maskgen.LearnRequest(recipe="eora", overrides={**SHORT, **given.pop("overrides", {})}, **given)


def made(wanted: maskgen.LearnRequest, listener: Any = None) -> SparseCheckpoint:
    result = maskgen.run(wanted) if listener is None else maskgen.run(wanted, listener)
    assert isinstance(result, maskgen.PruneResult) and isinstance(result.quality, Quality)
    assert result.sweep.corrects and not (result.out.parent / f"{result.out.name}.work").exists()
    return SparseCheckpoint.open(result.out)


@pytest.mark.parametrize("prior", ["sparse", "int8"])
def test_masks_and_values_stay_bit_for_bit(prior: str, places: Path, text_file: Path) -> None:
    after, before = made(request(places, text_file, prior=places / prior)), SparseCheckpoint.open(places / prior)
    assert after.config.correction == LowRankCorrection(RANK) and after.config.values == before.config.values
    assert after.config.mask_digest == before.config.mask_digest and after.config.targets == before.config.targets
    assert (after.config.base_model, after.config.base_digest) == ("dense", before.config.base_digest)
    old, new = read_all(places / prior), read_all(places / "out")
    assert {name for name in new if name not in old} == {
        name + suffix for name in after.config.targets for suffix in (".correction_out", ".correction_pool")
    }
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert json.loads((places / "out" / RECIPE_FILE).read_text())["method"]["options"]["rank"] == RANK


def test_less_of_the_error_is_left(places: Path, text_file: Path) -> None:
    """More rank, less divergence from dense."""
    divergences = []
    for rank in (0, 4, 32):
        if rank:
            made(request(places, text_file, out=places / f"r{rank}", overrides={"method.rank": rank}))
        found = places / (f"r{rank}" if rank else "sparse")
        wanted = maskgen.EvaluateRequest(
            model=found, against=places / "dense", data=text_file, max_windows=8, dtype="float32"
        )
        divergence = maskgen.evaluate(wanted).texts[0].divergence
        assert divergence is not None
        divergences.append(divergence.kl)
    assert divergences[0] > divergences[1] > 2 * divergences[2] > 0


def layer_inputs(served: nn.Module, name: str, windows: Tensor) -> Tensor:
    """What the linear layer `name` of a whole model reads, `[T, I]`."""
    found: list[Tensor] = []
    hook = served.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        served(windows)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("asymmetric", [False, True])
def test_inputs_are_those_of_the_served_model(
    asymmetric: bool, model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    """Blocks before are pruned and corrected: the same follows from a forward pass of the result, whole, in float32.

    And where the layer is to make up for what was lost before it, from one of the dense model.
    """
    dense_dir, windows = model_dir(), []
    maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=dense_dir, out=tmp_path / "sparse"))
    from maskgen.sweep import driver

    record = driver.blocks.record
    run = request(tmp_path, text_file, model=dense_dir, overrides={"method.asymmetric": asymmetric})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.blocks, "record", lambda *args: windows.extend(args[2]) or record(*args))
        after = made(run)
    served, dense = model.load(tmp_path / "out"), model.load(dense_dir)
    method = EoRA(RANK, asymmetric)

    def lost(module: str) -> Tensor:
        before, now = (layer_inputs(one, module, torch.cat(windows)) for one in (dense, served))
        return before - now

    # without it, all layers of a block are observed while the block is dense
    streams = {"model.layers.1.self_attn.o_proj": "model.layers.1.input_layernorm"} if asymmetric else {}
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.self_attn.q_proj", *streams):
        x_TI = layer_inputs(served, name, torch.cat(windows))
        stats = method.observe(None, x_TI)
        if asymmetric:
            drift = Drift(lost(name), lost(streams[name]) if name in streams else None)
            stats = method.observe_drift(stats, x_TI, drift)
        layer = after.layer(name)
        weight_OI = dense.get_submodule(name).weight.detach()
        expected = method.solve(weight_OI, layer.packed.unpack(), stats).dense(64)
        assert layer.correction is not None
        torch.testing.assert_close(layer.correction.dense(64), expected, rtol=1e-3, atol=1e-4)


def test_the_dense_model_is_found_or_given(places: Path, text_file: Path) -> None:
    """By the prior's own word, as the model of the request, as the teacher, with the prior as the model: one result."""
    moved = places / "elsewhere" / "dense"
    moved.parent.mkdir()
    made(request(places, text_file))
    made(request(places, text_file, out=places / "b", prior=None, model=places / "sparse"))
    (places / "dense").rename(moved)
    made(request(places, text_file, out=places / "c", model=moved))
    made(request(places, text_file, out=places / "d", teacher=moved))
    made(request(places, text_file, out=places / "e", prior=None, model=places / "sparse", teacher=moved))
    bytes_of = [(places / name / "model.safetensors").read_bytes() for name in ("out", "b", "c", "d", "e")]
    assert all(data == bytes_of[0] for data in bytes_of)
    with pytest.raises(
        ModelError, match=r"made from 'dense', which is not beside it; give that dense model as `model`"
    ):
        maskgen.run(request(places, text_file, out=places / "f"))


def test_layers_that_the_prior_keeps_dense_stay_dense(places: Path, text_file: Path) -> None:
    ignore = {"ignore": ["model.layers.1.*"]}
    maskgen.prune(
        maskgen.PruneRequest(recipe="magnitude", model=places / "dense", out=places / "some", overrides=ignore)
    )
    after = made(request(places, text_file, prior=places / "some"))
    before = SparseCheckpoint.open(places / "some")
    assert (after.config.targets, after.config.ignored) == (before.config.targets, before.config.ignored)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(places: Path, text_file: Path) -> None:
    def stop(event: maskgen.Event) -> None:
        if isinstance(event, maskgen.SweepProgress) and event.block == 1 and event.what == "block done":
            raise KeyboardInterrupt

    made(request(places, text_file, out=places / "whole"))
    with pytest.raises(KeyboardInterrupt):
        maskgen.run(request(places, text_file), stop)
    with pytest.raises(OutputExistsError, match="belongs to another run"):
        maskgen.run(request(places, text_file, prior=places / "int8"))
    with pytest.raises(OutputExistsError, match="belongs to another run"):
        maskgen.run(request(places, text_file, overrides={"method.rank": RANK + 1}))
    done = maskgen.run(request(places, text_file))
    assert isinstance(done, maskgen.PruneResult) and done.sweep.resumed_blocks == 2
    one, two = ((places / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == two


def test_what_does_not_fit_is_refused(places: Path, text_file: Path) -> None:
    masks = places / "masks.safetensors"
    other = models.save("llama", places / "other", seed=1, dtype=torch.bfloat16)
    models.save_sparse(other, places / "foreign")
    SparseCheckpoint.open(places / "sparse").mask_set().save(masks)
    for name, form in (("pooled", PooledCorrection(16, "trained")), ("lowrank", LowRankCorrection(4))):
        models.save_corrected(places / "dense", places / name, form)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"prior": None, "model": places / "dense"}, RecipeError, "eora starts from a sparse checkpoint: give `p"),
        (
            {"prior": None},
            RequestError,
            "`model` is missing; give the dense model, or a sparse checkpoint",
        ),
        (
            {"prior": masks},
            RequestError,
            r"`model` is missing, and .*masks\.safetensors is no sparse",
        ),
        (
            {"prior": masks, "model": places / "dense"},
            RecipeError,
            "has masks alone, and eora .* give a sparse",
        ),
        ({"prior": places / "pooled", "model": places / "dense"}, RecipeError, "pooled: its layers have a correction"),
        ({"prior": None, "model": places / "lowrank", "teacher": places / "dense"}, RecipeError, "adds no second one"),
        ({"prior": places / "foreign", "model": places / "dense"}, FormatError, "give that model"),
        ({"model": places / "dense", "teacher": places / "dense"}, RequestError, "is dense, and is its own teacher"),
        ({"overrides": {"pattern": "1:4"}}, RecipeError, "its pattern is 2:4, the recipe's is 1:4"),
        ({"overrides": {"method.rank": 33}}, RecipeError, r"k_proj: .* rank of 33 is too large .* at most 32"),
        ({"overrides": {"method.rank": True}}, RecipeError, "method.rank: True is a bool, expected a int"),
        ({"overrides": {"ignore": ["*.1.mlp.*"]}}, RecipeError, "is sparse, and the recipe wants it dense"),
        ({"micro_batch": 2}, RecipeError, "`micro_batch`: eora is a one-shot method and does not train"),
        ({"data": ()}, DataError, "method eora needs calibration text"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            maskgen.run(request(places, text_file, **changes))
        assert not (places / "out").exists() and not (places / "out.work").exists(), message


def test_a_start_whose_norms_were_trained_is_refused(places: Path, text_file: Path) -> None:
    training = {"steps": 1, "batch": 2, "window_tokens": 16, "heldout_windows": 5, "dtype": "float32", "scope": "all"}
    maskgen.learn(
        maskgen.LearnRequest(
            recipe="adaptive_sparse",
            model=places / "dense",
            data=text_file,
            out=places / "trained",
            overrides={f"train.{key}": value for key, value in training.items()},
        )
    )
    with pytest.raises(RecipeError, match=r"trained: \d+ tensors of layers that stay dense were trained too, such as"):
        maskgen.run(request(places, text_file, prior=places / "trained"))


def test_methods_that_train_do_not_go_on_from_it(places: Path, text_file: Path) -> None:
    made(request(places, text_file))
    wanted = maskgen.LearnRequest(
        recipe="adaptive_sparse_slorb", model=places / "out", data=text_file, out=places / "no"
    )
    with pytest.raises(RecipeError, match=r"have a correction, .* start from the checkpoint that it was added to"):
        maskgen.run(wanted)

"""Every function of the Python interface on a tiny model: what it returns, what it tells, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import DataError, ModelError, OutputExistsError, RecipeError, RequestError
from maskgen.core.mask import MaskSet
from maskgen.data import demo
from maskgen.hf import model
from tests import models

ModelDir = Callable[..., Path]
CALIBRATION = {"calibration.window_tokens": 32, "calibration.samples": 6}
TRAINING = {
    **CALIBRATION,
    "train.steps": 4,
    "train.batch": 4,
    "train.window_tokens": 16,
    "train.heldout_windows": 5,
    "train.dtype": "float32",
}


class Heard(list[Any]):
    """A listener that remembers."""

    def __call__(self, event: Any) -> None:
        self.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


def stages(heard: Heard) -> list[str]:
    return [event.name for event in heard.of(maskgen.Stage)]


def prune(dense: Path, text: Path, out: Path, **changes: Any) -> maskgen.PruneRequest:
    fields = {"recipe": "wanda", "model": dense, "data": text, "out": out, "overrides": CALIBRATION, **changes}
    return maskgen.PruneRequest(**fields)


def learn(dense: Path, text: Path, out: Path, **changes: Any) -> maskgen.LearnRequest:
    fields = {"recipe": "maskllm", "model": dense, "data": text, "out": out, "overrides": TRAINING, **changes}
    return maskgen.LearnRequest(**fields)


def test_prune_twice_in_one_process(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense, heard, masks = model_dir(), Heard(), tmp_path / "masks.safetensors"
    result = maskgen.prune(prune(dense, text_file, tmp_path / "one", masks_out=masks), heard)
    assert isinstance(result, maskgen.PruneResult) and result.out == tmp_path / "one"
    assert len(result.sweep.targets) == 7 * models.LAYERS == result.written.targets
    assert stages(heard) == ["loading", "measuring", "measuring", "writing"]
    done = [event.block for event in heard.of(maskgen.SweepProgress) if event.what == "block done"]
    assert done == list(range(models.LAYERS))
    assert SparseCheckpoint.open(result.out).config.mask_digest == MaskSet.load(masks).digest()
    again = maskgen.prune(prune(dense, text_file, tmp_path / "two"))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert again is not None and one == two and not (tmp_path / "two.work").exists()


def test_learn_tells_every_step_and_look(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    heard = Heard()
    result = maskgen.learn(learn(model_dir(), text_file, tmp_path / "out", eval_every=2), heard)
    assert isinstance(result, maskgen.LearnResult) and result.log.is_file()
    assert stages(heard) == ["prior", "loading", "training", "measuring", "writing"]
    assert [event.step for event in heard.of(maskgen.TrainingStep)] == [1, 2, 3, 4]
    looks = heard.of(maskgen.HeldOut)
    assert [event.step for event in looks] == [0, 2, 4]
    assert [record["perplexity"] for record in result.records if record["kind"] == "eval"] == [
        event.perplexity for event in looks
    ]
    first = heard.index(heard.of(maskgen.TrainingStep)[0])
    assert all(heard.index(event) < first for event in heard.of(maskgen.SweepProgress)), "the prior's, before training"


def test_run_does_either(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    one_shot = maskgen.run(learn(model_dir(), text_file, tmp_path / "a", recipe="magnitude", overrides={}))
    learned = maskgen.run(learn(model_dir(), text_file, tmp_path / "b", prior=tmp_path / "a"))
    assert isinstance(one_shot, maskgen.PruneResult) and isinstance(learned, maskgen.LearnResult)
    assert learned.records[0]["digests"]["prior"] == SparseCheckpoint.open(tmp_path / "a").config.mask_digest


def test_what_a_listener_raises_stops_a_run_which_then_goes_on(
    model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    def stop(event: maskgen.Event) -> None:
        if isinstance(event, maskgen.SweepProgress) and event.block == 1:
            raise KeyboardInterrupt

    request = prune(model_dir(), text_file, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        maskgen.prune(request, stop)
    assert not request.out.exists()
    result = maskgen.prune(request)
    assert isinstance(result, maskgen.PruneResult) and result.sweep.resumed_blocks == 1


def test_a_result_that_only_lacks_its_tidying_is_said_to_be_finished(
    model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    request = prune(model_dir(), text_file, tmp_path / "out", keep_work=True)
    maskgen.prune(request)
    (tmp_path / "out.work" / "kept").unlink()
    assert maskgen.prune(prune(model_dir(), text_file, tmp_path / "out")) == maskgen.AlreadyFinished(tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


def test_permute_compress_quantise_decompress(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense, heard = model_dir("llama", dtype=torch.bfloat16), Heard()
    permuted = maskgen.permute(
        maskgen.PermuteRequest(
            recipe="ria", model=dense, data=text_file, out=tmp_path / "permuted", overrides=CALIBRATION
        ),
        heard,
    )
    assert permuted.report.kept[1] > permuted.report.kept[0] and permuted.recipe.method.name == "ria"
    assert stages(heard) == ["loading", "writing"] and len(heard.of(maskgen.SweepProgress)) == models.LAYERS

    masks = tmp_path / "masks.safetensors"
    maskgen.prune(prune(dense, text_file, tmp_path / "sparse", masks_out=masks))
    made = maskgen.compress(maskgen.CompressRequest(model=dense, masks=masks, out=tmp_path / "compressed"))
    assert made.written.ratio == 0.5625
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("sparse", "compressed"))
    assert one == two
    with pytest.raises(RequestError, match="`group` 64: only of int4 values"):
        maskgen.quantise(maskgen.QuantiseRequest(model=made.out, values="int8", group=64, out=tmp_path / "int8"))
    small = maskgen.quantise(maskgen.QuantiseRequest(model=made.out, values="int8", out=tmp_path / "int8"))
    assert small.written.packed_target_bytes < made.written.packed_target_bytes
    report = maskgen.inspect(maskgen.InspectRequest(model=small.out))
    assert (report.values, len(report.packed_layers), report.pattern) == ("int8", 7 * models.LAYERS, "2:4")

    back = maskgen.decompress(maskgen.DecompressRequest(model=made.out, out=tmp_path / "dense"))
    assert not back.folded and back.total_bytes == made.written.total_bytes - made.written.packed_target_bytes + (
        made.written.dense_target_bytes
    )
    sparse_state, dense_state = (maskgen.load(path).state_dict() for path in (made.out, back.out))
    assert all(torch.equal(dense_state[name], tensor) for name, tensor in sparse_state.items())
    assert maskgen.load(made.out, dtype="float32", device="cpu").dtype == torch.float32


def test_evaluate_gives_the_number_its_protocol_and_its_windows(
    model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    heard = Heard()
    request = maskgen.EvaluateRequest(model=model_dir(), data=text_file, window_tokens=32, max_windows=5, batch=2)
    result = maskgen.evaluate(request, heard)
    assert result.value == result.perplexity.value > 1 and result.dtype == "float32"
    assert [(event.done, event.windows) for event in heard.of(maskgen.Scored)] == [(2, 5), (4, 5), (5, 5)]
    assert [len(window.ids) for window in result.windows] == [32] * 5
    ids = torch.tensor([window.ids for window in result.windows])
    with torch.no_grad():
        loss = float(model.load(model_dir())(input_ids=ids, labels=ids).loss)
    assert torch.tensor(result.value).log() == pytest.approx(loss, rel=1e-5)
    assert result.to_dict()["perplexity"] == result.value


def test_evaluate_several_texts_against_the_dense_model(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense, heard, other = model_dir(), Heard(), tmp_path / "other.txt"
    other.write_text(models.TEXT[9000:15000])
    models.save_sparse(dense, tmp_path / "sparse")
    protocol = {"window_tokens": 32, "max_windows": 4, "batch": 3}
    request = maskgen.EvaluateRequest(model=tmp_path / "sparse", against=dense, data=[text_file, other], **protocol)
    result = maskgen.evaluate(request, heard)
    assert result.against == dense.name and [text.text for text in result.texts] == [text_file.name, "other.txt"]
    assert [(event.done, event.windows) for event in heard.of(maskgen.Scored)] == [(3, 8), (4, 8), (7, 8), (8, 8)]
    for text, file in zip(result.texts, request.data, strict=True):
        alone = (maskgen.EvaluateRequest(model=one, data=file, **protocol) for one in (request.model, dense))
        assert text.dense is not None and text.divergence is not None
        assert [text.value, text.dense.value] == [pytest.approx(maskgen.evaluate(one).value) for one in alone]
        assert text.divergence.kl > 0 and text.divergence.agreement < 1
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["texts"][1]["divergence"]["kl"] == result.texts[1].divergence.kl
    with pytest.raises(RequestError, match="2 texts were evaluated; each has its own result in `texts`"):
        result.value  # noqa: B018
    twin = maskgen.evaluate(maskgen.EvaluateRequest(model=dense, against=dense, data=text_file, **protocol))
    assert twin.texts[0].divergence.kl == 0 and twin.to_dict()["divergence"]["agreement"] == 1


def test_models_that_read_other_tokens_are_not_compared(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    models.save("llama", other)
    tokenizer = models.tokenizer()
    tokenizer.add_tokens(["stones"])
    tokenizer.save_pretrained(other)
    heard = Heard()
    request = maskgen.EvaluateRequest(model=model_dir(), against=other, data=text_file, window_tokens=32)
    with pytest.raises(ModelError, match="make different tokens of the same text; `against`"):
        maskgen.evaluate(request, heard)
    twice = maskgen.EvaluateRequest(model=model_dir(), data=[text_file, text_file], window_tokens=32)
    with pytest.raises(RequestError, match="given twice"):
        maskgen.evaluate(twice, heard)
    assert stages(heard) == []


def test_report_and_demo(model_dir: ModelDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maskgen.learn(learn(model_dir(), text_file, tmp_path / "out"))
    page = maskgen.report(maskgen.ReportRequest(runs=tmp_path / "out", out=tmp_path / "page.html"))
    assert page.out.stat().st_size == page.total_bytes > 1000

    def build(out: Path, tell: Callable[[str], None]) -> Path:
        tell("converting")
        (out / "heldout").mkdir(parents=True)
        (out / "heldout" / "news.txt").write_text("News.")
        return out

    monkeypatch.setattr(demo, "build", build)
    heard, out = Heard(), tmp_path / "demo"
    made = maskgen.demo(maskgen.DemoRequest(out=out), heard)
    assert (made.model, made.calibration, made.conversations, made.recipe, made.heldout) == (
        out / "model",
        out / "calibration.txt",
        out / "conversations.jsonl",
        out / "quick.toml",
        [out / "heldout" / "news.txt"],
    )
    assert stages(heard) == ["converting"]


@pytest.mark.parametrize(
    ("call", "changes", "kind", "message"),
    [
        ("prune", {"recipe": "maskllm"}, RecipeError, "maskllm is a learned method; use learn"),
        ("learn", {"recipe": "wanda", "overrides": {}}, RecipeError, "wanda is a one-shot method; use prune"),
        ("run", {"recipe": "wanda", "overrides": {}, "micro_batch": 8}, RecipeError, "`micro_batch`: wanda is a one-"),
        ("prune", {"data": ()}, DataError, "method wanda needs calibration text; give it with `data`"),
        ("learn", {"data": ()}, DataError, "method maskllm learns from text; give it with `data`"),
        ("prune", {"device": "toaster"}, RequestError, "toaster; expected cpu, cuda or cuda:N"),
        ("prune", {"device": "meta"}, RequestError, "`device` meta: computes nothing; expected cpu, cuda or cuda:N"),
        ("prune", {"overrides": {"calibration.window_tokens": 129}}, DataError, "calibration.window_tokens: windows"),
        ("learn", {"overrides": {"train.window_tokens": 129}}, DataError, "train.window_tokens: windows of 129 tokens"),
        ("prune", {"out": "{tmp}"}, OutputExistsError, "exists; remove it or choose another output"),
        ("prune", {"masks_out": "{tmp}"}, OutputExistsError, "exists; remove it or choose another output"),
        ("prune", {"prior": "x"}, RecipeError, "`prior` x: wanda with these options starts from no mask"),
        ("prune", {"recipe": "admm", "prior": "x"}, RecipeError, "keep its masks and solve for the weights (method.m"),
        ("prune", {"recipe": "admm", "overrides": {"method.mask": "prior"}}, RecipeError, "start from; give `prior`"),
        ("learn", {"recipe": "dense_control", "masks_out": "k"}, RecipeError, "`masks_out` k: dense_control writes a"),
        ("learn", {"shard": True}, RecipeError, "`shard` splits a run over processes; start it with torchrun"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    call: str,
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "load", lambda *args: pytest.fail("a model was loaded"))
    settled = {name: tmp_path if value == "{tmp}" else value for name, value in changes.items()}
    make = prune if call == "prune" else learn
    with pytest.raises(kind) as error:
        getattr(maskgen, call)(make(model_dir(), text_file, **{"out": tmp_path / "out", **settled}))
    assert message in str(error.value)
    assert not (tmp_path / "out.work").exists()


def test_a_request_of_another_kind_is_refused(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    one_shot = prune(model_dir(), text_file, tmp_path / "out")
    for function in (maskgen.learn, maskgen.run):
        with pytest.raises(RequestError, match=r"was given a PruneRequest, expected a LearnRequest"):
            function(one_shot)  # type: ignore[arg-type]
    other = maskgen.PermuteRequest(recipe="wanda", model=model_dir(), data=text_file, out=tmp_path / "out")
    with pytest.raises(RequestError, match="prune was given a PermuteRequest, expected a PruneRequest"):
        maskgen.prune(other)  # type: ignore[arg-type]
    trained = learn(model_dir(), text_file, tmp_path / "out", recipe="wanda", overrides=CALIBRATION, micro_batch=2)
    with pytest.raises(RecipeError, match="`micro_batch`: wanda is a one-shot method"):
        maskgen.prune(trained)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["compress", "quantise", "decompress"])
def test_a_place_that_is_taken_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    fields = {"model": tmp_path / "no", "out": tmp_path}
    requests = {
        "compress": lambda: maskgen.CompressRequest(**fields, masks=tmp_path / "no"),
        "quantise": lambda: maskgen.QuantiseRequest(**fields, values="int8"),
        "decompress": lambda: maskgen.DecompressRequest(**fields),
    }
    with pytest.raises(OutputExistsError, match="exists; remove it or choose another output"):
        getattr(maskgen, name)(requests[name]())

"""The demo: text split honestly, a model that learns, and a directory that is whole or absent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskgen.core.digest import digest_weights
from maskgen.core.errors import DataError, ModelError, OutputExistsError, SparseError
from maskgen.data import demo_text
from maskgen.hf import new_llama
from maskgen.train import demo

WORDS = ("list", "class", "object", "method", "string", "module", "number", "value")
DOCUMENTS = {
    f"doc/{number}": "\n\n".join(
        f"The {WORDS[(number + line) % 8]} number {line} of document {number} is a {WORDS[line % 8]}, we know."
        for line in range(20)
    )
    for number in range(40)
}
TINY = demo.Training(
    vocabulary=320,
    hidden=64,
    ffn=64,
    layers=1,
    heads=2,
    kv_heads=1,
    max_tokens=64,
    steps=30,
    batch=2,
    window_tokens=32,
    long_steps=3,
    warmup_steps=3,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[demo.Progress]]:
    seen: list[demo.Progress] = []
    return demo.build(tmp_path_factory.mktemp("demo") / "out", seen.append, TINY, DOCUMENTS), seen


def test_heldout_paragraphs_are_not_trained_on() -> None:
    shared = "This paragraph stands in every single document, and it is long enough to be recognised again."
    corpus = demo_text.split({name: f"{text}\n\n{shared}\n\nshort" for name, text in DOCUMENTS.items()})
    assert corpus.heldout.keys() | corpus.train.keys() == DOCUMENTS.keys()
    assert not corpus.heldout.keys() & corpus.train.keys()
    assert sum(text.count(shared) for text in corpus.heldout.values()) == 1
    assert not any(shared in text for text in corpus.train.values())
    assert all(text.endswith("short") for text in corpus.train.values())


def test_the_split_depends_on_names_only() -> None:
    backwards = dict(reversed(DOCUMENTS.items()))
    assert demo_text.split(backwards) == demo_text.split(DOCUMENTS)


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(DataError, match="1 documents"):
        demo_text.split({"one": "text", "empty": " "})


def test_standard_documents_are_topics_and_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json/decoder.py", "site-packages/json.py", "test/test_json.py", "not_in_python.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""Module {name}."""\ndef f():\n    """Function."""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    documents = demo_text.standard_documents()
    assert "assert" in documents["topics/assert"]
    docstrings = {name: text for name, text in documents.items() if not name.startswith("topics/")}
    assert docstrings == {"docstrings/json/decoder.py": "Module json/decoder.py.\n\nFunction."}


def test_the_model_is_an_ordinary_directory(built: tuple[Path, list[demo.Progress]]) -> None:
    folder = built[0] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert model.config.max_position_embeddings == tokenizer.model_max_length == TINY.max_tokens
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (demo.BOS, demo.EOS, demo.PAD)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 1
    text = "Any text:\n\tà la carte, 漢字"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "The list"}], tokenize=False)
    assert chat == "The list\n\n"


def test_training_learns_and_reports(built: tuple[Path, list[demo.Progress]]) -> None:
    out, seen = built
    assert [progress.step for progress in seen] == list(range(1, TINY.steps + 1))
    assert seen[-1].loss < 0.75 * seen[0].loss
    assert seen[-1].remaining_s == 0 < seen[0].remaining_s
    facts = json.loads((out / demo.PROVENANCE_FILE).read_text())
    assert facts["training"]["seed"] == TINY.seed
    assert 1 < facts["heldout_perplexity"]["value"] < 0.75 * TINY.vocabulary
    assert str(TINY.max_tokens) in facts["heldout_perplexity"]["protocol"]


def test_the_texts_beside_the_model_are_the_split(built: tuple[Path, list[demo.Progress]]) -> None:
    corpus = demo_text.split(DOCUMENTS)
    for name, part in (("calibration.txt", corpus.train), ("heldout.txt", corpus.heldout)):
        assert (built[0] / name).read_text() == "\n\n".join(part.values()) + "\n"


def test_the_same_seed_gives_the_same_model(built: tuple[Path, list[demo.Progress]], tmp_path: Path) -> None:
    torch.manual_seed(1234)
    again = demo.build(tmp_path / "again", None, TINY, DOCUMENTS)
    other = demo.build(tmp_path / "other", None, replace(TINY, seed=1), DOCUMENTS)
    assert digest_weights(again / "model") == digest_weights(built[0] / "model") != digest_weights(other / "model")


def test_a_finished_demo_is_not_built_again(built: tuple[Path, list[demo.Progress]]) -> None:
    seen: list[demo.Progress] = []
    assert demo.build(built[0], seen.append, TINY, DOCUMENTS) == built[0]
    assert not seen


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(progress: demo.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.build(tmp_path / "out", interrupt, TINY, DOCUMENTS)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not a demo"):
        demo.build(tmp_path, None, TINY, DOCUMENTS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than a window of 99999"):
        demo.build(tmp_path / "out", None, replace(TINY, window_tokens=99999), DOCUMENTS)
    assert not list(tmp_path.iterdir())


def test_targets_are_inputs_moved_by_one() -> None:
    windows = demo.draw(torch.arange(50), 4, 16, torch.Generator().manual_seed(0))
    assert windows.shape == (4, 17)
    assert torch.equal(windows[:, 1:], windows[:, :-1] + 1)
    assert demo.draw(torch.arange(17), 1, 16, torch.Generator())[0].tolist() == list(range(17))


def test_the_default_place_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_dir() == tmp_path / "sparse-serve" / "demo-v1"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert demo.default_dir() == Path("/home/somebody/.cache/sparse-serve/demo-v1")


def test_a_user_without_a_home_is_told_to_say_where(no_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with pytest.raises(SparseError, match=r"no folder for the demo: .*set .*XDG.* or give `out`"):
            demo.build()
        # older releases of platformdirs leave the home unresolved
        monkeypatch.setattr(demo, "user_cache_path", lambda app: Path("~/.cache") / app)


def test_the_default_model_can_be_pruned_whole() -> None:
    default = demo.Training()
    assert default.hidden % 64 == default.ffn % 64 == 0
    assert default.heads % default.kv_heads == 0 < default.heads - default.kv_heads


def test_a_llama_that_cannot_be_is_refused() -> None:
    with pytest.raises(ModelError, match="no Llama"):
        new_llama.new_llama(hidden_size=64, num_attention_heads=3)


def test_special_tokens_must_be_in_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = demo.train_tokenizer(DOCUMENTS, 300)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = new_llama.new_llama(vocab_size=400, bos_token_id=0, eos_token_id=399, pad_token_id=2, **sizes)
    with pytest.raises(ModelError, match="eos_token_id is 399"):
        new_llama.save(model, tokenizer.to_str(), tmp_path)

"""Only generated text comes back, also where the prompt ends inside a character."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests import models

PEPPER = "\N{HOT PEPPER}"


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a token a character, and for those it does not have one a byte."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", *bytes_, "▁", *map(chr, range(ord("A"), ord("z")))]
    model = BPE({piece: id_ for id_, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    inner = Tokenizer(model)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


TOKENIZERS = {"byte-level": models.tokenizer, "byte-fallback": byte_fallback}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def answer(tokenizer: PreTrainedTokenizerFast, prompt: list[int], output: list[int], **sampling: object) -> list[str]:
    """The text of each token of the output, as a stream has it."""
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    from sparse_serve.engine import vllm_detokenizer

    vllm_detokenizer.install()
    params = SamplingParams(**sampling)
    request = SimpleNamespace(request_id="a", prompt_token_ids=prompt, prompt_embeds=None, sampling_params=params)
    made = IncrementalDetokenizer.from_new_request(tokenizer, request)
    pieces = []
    for number, token_id in enumerate(output, 1):
        made.update([token_id], stop_terminated=False)
        pieces.append(made.get_next_output_text(finished=number == len(output), delta=True))
    return pieces


@pytest.mark.parametrize("before", ["", "Hello▁", PEPPER * 40], ids=["nothing", "a word", "many"])
@pytest.mark.parametrize("given", [1, 2, 3])
def test_text_begins_behind_a_character_that_is_left_unfinished(
    tokenizer: PreTrainedTokenizerFast, before: str, given: int
) -> None:
    prompt = ids(tokenizer, before + PEPPER)[: given - 4]  # four bytes, a token each
    assert "".join(answer(tokenizer, prompt, ids(tokenizer, "abc"))) == "abc"


@pytest.mark.parametrize("before", ["", "Hello▁", PEPPER * 40], ids=["nothing", "a word", "many"])
def test_text_begins_with_a_character_that_is_finished(tokenizer: PreTrainedTokenizerFast, before: str) -> None:
    pepper = ids(tokenizer, PEPPER)
    assert len(pepper) == 4
    pieces = answer(tokenizer, ids(tokenizer, before) + pepper[:2], pepper[2:] + ids(tokenizer, "a"))
    assert pieces == ["", PEPPER, "a"]


@pytest.mark.parametrize("prompt", ["Hello�", "�", "�" * 30, "a�b�"])
def test_the_character_for_unknown_ones_may_end_a_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    assert "".join(answer(tokenizer, ids(tokenizer, prompt), ids(tokenizer, "abc"))) == "abc"


@pytest.mark.parametrize("prompt", ["Hello", PEPPER, "a" * 100])
def test_other_prompts_are_answered_as_by_vllm(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    output = ids(tokenizer, f"b{PEPPER}c")
    assert answer(tokenizer, ids(tokenizer, prompt), output) == ["b", "", "", "", PEPPER, "c"]


def test_a_special_token_may_follow_the_unfinished_character() -> None:
    tokenizer = models.tokenizer()
    prompt = [*ids(tokenizer, "Hello" + PEPPER)[:-1], tokenizer.eos_token_id]
    assert "".join(answer(tokenizer, prompt, ids(tokenizer, "abc"))) == "abc"


def test_stop_strings_are_looked_for_in_generated_text_only(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = ids(tokenizer, "stop" + PEPPER)[:-1]
    assert "".join(answer(tokenizer, prompt, ids(tokenizer, "abc"), stop=["stop"])) == "abc"
    assert "".join(answer(tokenizer, prompt, ids(tokenizer, "abcstop"), stop=["stop"])) == "abc"

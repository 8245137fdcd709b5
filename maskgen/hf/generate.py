"""Text that a model writes itself, which needs no corpus: conversations of a chat model, documents of any other.

A chat model is given the beginning of a user's turn, as its own template writes it, and nothing else: it makes up a
question. Then it answers that (Xu et al., "Magpie", arXiv:2406.08464). Any other model goes on from the token that its
texts begin with. Sampling is at temperature 0.8 from the most likely 95 %: a small model writes gibberish at 1.

Legend: B = batch, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from maskgen.core.errors import DataError
from maskgen.numerics.products import bfloat16_products

TEMPERATURE, TOP_P = 0.8, 0.95
QUESTION_TOKENS, ANSWER_TOKENS, DOCUMENT_TOKENS = 96, 384, 512
BATCH = 64
_MARK = "@@question@@"

Row = dict[str, Any]
"""{"messages": [...]} or {"text": "..."}."""


@dataclass(frozen=True)
class Writer:
    """A model on the device where it computes, and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    def rows(self, documents: int, seed: int, tell: Callable[[int], None] = lambda done: None) -> Iterator[Row]:
        """At least `documents` texts, batch after batch; `tell` is called with how many there are.

        Raises `DataError` when the model writes nothing that could be used.
        """
        write = self._documents if getattr(self.tokenizer, "chat_template", None) is None else self._conversations
        done = 0
        for batch in range(2 * documents // BATCH + 2):
            with torch.random.fork_rng():
                torch.manual_seed(seed + batch)
                for row in write(min(BATCH, documents)):
                    done += 1
                    yield row
            tell(done)
            if done >= documents:
                return
        raise DataError(f"the model wrote {done} texts where {documents} were wanted; give a file of text instead")

    def _documents(self, count: int) -> Iterator[Row]:
        start = next((it for it in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if it is not None), None)
        if start is None:
            raise DataError("the tokenizer has no token that a text begins with; give a file of text instead")
        for ids in self._continue([[start]] * count, DOCUMENT_TOKENS):
            if text := self._decode(ids):
                yield {"text": text}

    def _conversations(self, count: int) -> Iterator[Row]:
        before, _, _ = self._rendered(_MARK, answer=False).partition(_MARK)
        opening = self._encode(before)
        questions = [self._decode(ids) for ids in self._continue([opening] * count, QUESTION_TOKENS)]
        asked = [question for question in questions if question]
        prompts = [self._encode(self._rendered(question, answer=True)) for question in asked]
        answers = self._continue(prompts, ANSWER_TOKENS) if prompts else []
        for question, ids in zip(asked, answers, strict=True):
            if answer := self._decode(ids):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                yield {"messages": messages}

    def _rendered(self, question: str, answer: bool) -> str:
        messages = [{"role": "user", "content": question}]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    @torch.no_grad()
    def _continue(self, prompts: list[list[int]], most: int) -> list[list[int]]:
        """What the model puts after each prompt, up to the end of its turn or `most` tokens."""
        ends = self._ends()
        longest = max(map(len, prompts))
        device = next(self.model.parameters()).device
        padding = [longest - len(prompt) for prompt in prompts]
        ids_BT = torch.tensor([[ends[0]] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        mask_BT = torch.arange(longest) >= torch.tensor(padding)[:, None]
        config = GenerationConfig(
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=most,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        with bfloat16_products(device):
            written_BT = self.model.generate(  # type: ignore[operator]
                ids_BT.to(device), attention_mask=mask_BT.long().to(device), generation_config=config
            )
        return [_up_to(row, ends) for row in written_BT[:, longest:].tolist()]

    def _ends(self) -> list[int]:
        """Tokens that end a turn or a text."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id]
        found = list(dict.fromkeys(end for end in ends if end is not None))
        if not found:
            raise DataError("neither model nor tokenizer says which token ends a text; give a file of text instead")
        return found


def _up_to(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((position for position, token in enumerate(ids) if token in ends), len(ids))]

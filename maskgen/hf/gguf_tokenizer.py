"""How the tokenizer of a GGUF file cuts a text into words, before byte-pair encoding.

A GGUF file names it (`tokenizer.ggml.pre`); the rules behind a name are those of the tokenizers it was made from. What
transformers (5.19) makes of such a file cuts as GPT-2 does, or as the architecture usually does, whatever the name is:
several spaces before a digit become other tokens than those that the model was trained on.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, pre_tokenizers

PRE_TOKENIZER = "tokenizer.ggml.pre"
"""The key of a GGUF file that names the rules."""

_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN_2 = ("qwen2",)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Published in the `tokenizer.json` of Llama 3 and Qwen 2, which differ in how many digits are a word."""


def correct(tokenizer: Any, name: str) -> None:
    """Let a byte-level tokenizer of transformers cut by the rules of this name; a name not known here changes nothing.

    `tokenizer` is one of transformers' fast tokenizers.
    """
    if name in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        rules = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif name in (*_LLAMA_3, *_QWEN_2):
        words = Regex(_WORDS.format(digits="{1,3}" if name in _LLAMA_3 else ""))
        split = pre_tokenizers.Split(words, behavior="isolated", invert=False)
        rules = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)

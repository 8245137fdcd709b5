"""A model to benchmark: `python -m tests.bench.random_llama OUT` makes `OUT/dense` and `OUT/sparse`.

A Llama with random weights, and the same with 2:4 magnitude masks. Speed depends on shapes and not on values; what it
generates is noise. By default its layers have TinyLlama's shapes, eight of them: 352 M weights that can be pruned. The
vocabulary is small, so that the head, which stays dense, takes 2 % of the weights; its tokenizer is trained on the help
texts that every CPython carries. Llama-3.2-1B's shapes, whose head is 21 % of the weights, are

    --hidden 2048 --ffn 8192 --layers 16 --kv-heads 8 --vocabulary 128256
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskgen.cli import parser as cli

HEAD = 64
BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
"""The model only continues text, so a conversation is its text."""


def main() -> int:
    """Make the dense directory, then run `maskgen run magnitude` on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory to make")
    parser.add_argument("--hidden", type=int, default=2048, help=f"a multiple of {2 * HEAD}")
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=2048)
    args = parser.parse_args()
    build(args)
    return cli.main(["run", "magnitude", "--model", str(args.out / "dense"), "--out", str(args.out / "sparse")])


def build(args: argparse.Namespace) -> None:
    """A bfloat16 Llama and its tokenizer in `out/dense`."""
    tokenizer = train_tokenizer(args.vocabulary)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_tokens,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(args.out / "dense")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=args.max_tokens, bos_token=BOS, eos_token=EOS
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(args.out / "dense")


def train_tokenizer(vocabulary: int) -> Tokenizer:
    """Byte-level BPE: any text in, the same text out. Has as many tokens as asked for: words that no text is cut into
    stand for those that the training text was too short for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    rules = json.loads(tokenizer.to_str())
    words = rules["model"]["vocab"]
    words |= {f"Ġ{number}x": number for number in range(len(words), vocabulary)}
    return Tokenizer.from_str(json.dumps(rules))


if __name__ == "__main__":
    raise SystemExit(main())

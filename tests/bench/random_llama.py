"""A model to benchmark: `python -m tests.bench.random_llama OUT` makes `OUT/dense` and `OUT/sparse`.

A Llama with random weights, and the same with 2:4 magnitude masks. Speed depends on shapes and not on values; what it
generates is noise. By default its layers have TinyLlama's shapes, eight of them: 352 M weights that can be pruned. The
vocabulary is small, so that the head, which stays dense, takes 2 % of the weights; its tokenizer is trained on the help
texts that every CPython carries.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch

from maskgen.cli import parser as cli
from maskgen.hf import new_llama
from maskgen.train import demo

HEAD = 64


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
    tokenizer = demo.train_tokenizer(topics, args.vocabulary)
    torch.manual_seed(0)
    model = new_llama.new_llama(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(demo.BOS),
        eos_token_id=tokenizer.token_to_id(demo.EOS),
        pad_token_id=tokenizer.token_to_id(demo.PAD),
    )
    new_llama.save(model, tokenizer.to_str(), args.out / "dense", demo.CHAT_TEMPLATE)


if __name__ == "__main__":
    raise SystemExit(main())

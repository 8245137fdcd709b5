"""A small real model, trained on the spot: something to prune, compress, serve and measure without a download.

Random weights would not do: pruning a random model changes nothing that anybody can see. So `build` trains a Llama of
about a million weights on text that every CPython carries: the language reference behind `help()` (`pydoc_data.topics`)
and the docstrings of the standard library. That takes about three minutes on one core and yields text that looks like
Python's documentation without meaning anything, and a perplexity that pruning visibly harms.

How it is kept honest:

* a tenth of the documents, and every long paragraph they share with others, is never trained on (`demo_text`);
* the number of steps is fixed and every draw is seeded, so the same Python and torch give the same model however
  busy the machine is;
* `demo.json` says which text, how much of it, which settings, and the perplexity on the held-out text.

The last steps use windows as long as the model reads, because a position it never saw in training would ruin every
longer evaluation. Method: a plain small-Llama recipe, AdamW (Loshchilov & Hutter, arXiv:1711.05101) under a cosine.

Legend: B = windows, T = tokens of a window.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from maskgen.core.digest import digest_bytes
from maskgen.core.errors import DataError, OutputExistsError, SparseError
from maskgen.core.files import write_json
from maskgen.core.perplexity import Protocol
from maskgen.data.demo_text import split, standard_documents
from maskgen.hf import evaluate, new_llama

PROVENANCE_FILE = "demo.json"
"""Written last: a directory that has it is complete."""

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
"""The model only continues text, so a conversation is its text."""


@dataclass(frozen=True)
class Training:
    """Everything that decides the result, apart from the text; learning rate falls on a cosine to a tenth."""

    vocabulary: int = 2048
    hidden: int = 128
    ffn: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    max_tokens: int = 2048
    steps: int = 1700
    batch: int = 2
    window_tokens: int = 256
    long_steps: int = 80
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a build stands; `remaining_s` is an estimate from the speed so far."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    remaining_s: float


def default_dir() -> Path:
    """Where the demo lives unless the user says otherwise: `sparse-serve/demo-v1` in the user's cache.

    Raises `SparseError` for a user without a home directory.
    """
    try:
        folder = user_cache_path("sparse-serve")
    except RuntimeError as error:
        raise SparseError(f"no folder for the demo: {error}; or give `out`") from None
    if not folder.is_absolute():  # older releases of platformdirs leave `~` in it
        raise SparseError(f"no folder for the demo: {folder} is not absolute; set XDG_CACHE_HOME to one, or give `out`")
    return folder / "demo-v1"


def build(
    out: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    training: Training | None = None,
    documents: Mapping[str, str] | None = None,
) -> Path:
    """Make `out/model`, `out/calibration.txt` and `out/heldout.txt`, or find them made; returns `out`.

    `out` defaults to `default_dir()`, `documents` to the standard library's text. A directory that holds a finished
    demo is returned at once; one that holds anything else is `OutputExistsError`. The result appears whole or not at
    all. Raises `DataError` when there is too little text.
    """
    out = default_dir() if out is None else out
    if (out / PROVENANCE_FILE).is_file():
        return out
    if out.exists():
        raise OutputExistsError(f"{out} exists and is not a demo; remove it or choose another output")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _build(temporary, progress, training or Training(), documents or standard_documents())
        temporary.rename(out)
    except OSError:
        if not (out / PROVENANCE_FILE).is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _build(
    folder: Path, progress: Callable[[Progress], None] | None, training: Training, documents: Mapping[str, str]
) -> None:
    began_s = time.monotonic()
    corpus = split(documents)
    tokenizer = train_tokenizer(corpus.train, training.vocabulary)
    tokens_T = encode(tokenizer, corpus.train)
    model = _new_model(training, tokenizer)
    with _one_thread():
        _train(model, tokens_T, training, progress)
    (folder / "model").mkdir(parents=True)
    new_llama.save(model, tokenizer.to_str(), folder / "model", CHAT_TEMPLATE)
    for name, part in (("calibration.txt", corpus.train), ("heldout.txt", corpus.heldout)):
        (folder / name).write_text("\n\n".join(part.values()) + "\n", "utf-8")
    facts = {
        "text": "pydoc_data.topics and the docstrings of the standard library of CPython "
        + ".".join(map(str, sys.version_info[:3])),
        "text_digest": digest_bytes((folder / "calibration.txt").read_bytes()),
        "train_documents": len(corpus.train),
        "train_tokens": len(tokens_T),
        "heldout_documents": len(corpus.heldout),
        "training": asdict(training),
        "torch": torch.__version__,
        "heldout_perplexity": _heldout_perplexity(model.float(), tokenizer, folder / "heldout.txt", training),
        "build_s": round(time.monotonic() - began_s, 1),
    }
    write_json(folder / PROVENANCE_FILE, facts)


def train_tokenizer(documents: Mapping[str, str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: any text in, the same text out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents.values(), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Mapping[str, str]) -> Tensor:
    """All documents as one row of token ids, each between BOS and EOS; int64 `[T]`."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    parts = tokenizer.encode_batch(list(documents.values()))
    return torch.tensor([token for part in parts for token in (bos, *part.ids, eos)])


def _new_model(training: Training, tokenizer: Tokenizer) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        return new_llama.new_llama(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=training.hidden,
            intermediate_size=training.ffn,
            num_hidden_layers=training.layers,
            num_attention_heads=training.heads,
            num_key_value_heads=training.kv_heads,
            max_position_embeddings=training.max_tokens,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
        )


def _train(model: nn.Module, tokens_T: Tensor, training: Training, progress: Callable[[Progress], None] | None) -> None:
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = _optimizer(model, training)
    total_tokens = sum(math.prod(_window_shape(step, training)) for step in range(training.steps))
    began_s, done_tokens = time.monotonic(), 0
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _schedule(step, training)
        shape = _window_shape(step, training)
        loss = _step(model, optimizer, draw(tokens_T, *shape, generator))
        done_tokens += math.prod(shape)
        if progress is not None:
            tokens_per_s = done_tokens / (time.monotonic() - began_s)
            remaining_s = (total_tokens - done_tokens) / tokens_per_s
            progress(Progress(step + 1, training.steps, loss, tokens_per_s, remaining_s))
    model.eval()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain little from a second thread, and lose tenfold when another process wants its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW; norms are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=training.weight_decay)


def _schedule(step: int, training: Training) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / training.warmup_steps)
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / training.steps))


def _window_shape(step: int, training: Training) -> tuple[int, int]:
    """Windows and tokens per window of a step: short ones first, one as long as the model reads at the end."""
    if step >= training.steps - training.long_steps:
        return 1, training.max_tokens
    return training.batch, training.window_tokens


def draw(tokens_T: Tensor, batch: int, window_tokens: int, generator: torch.Generator) -> Tensor:
    """Windows at random places, int64 `[B, T + 1]`: inputs and, one to the right, targets. `DataError` if too short."""
    places = len(tokens_T) - window_tokens
    if places < 1:
        raise DataError(f"{len(tokens_T)} tokens of text, fewer than a window of {window_tokens}; give more text")
    starts = torch.randint(places, (batch,), generator=generator).tolist()
    return torch.stack([tokens_T[start : start + window_tokens + 1] for start in starts])


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids_BT: Tensor) -> float:
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _heldout_perplexity(model: nn.Module, tokenizer: Tokenizer, file: Path, training: Training) -> dict[str, Any]:
    """Perplexity of the saved weights, with its protocol."""
    ids = tokenizer.encode(file.read_text("utf-8")).ids
    result = evaluate.perplexity(model, ids, Protocol(window_tokens=training.max_tokens))
    return {
        "value": round(result.value, 3),
        "protocol": result.protocol.describe(),
        "windows": len(result.nll_per_window),
    }

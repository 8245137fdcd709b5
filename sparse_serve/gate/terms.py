"""The gate's vocabulary, for readers who know nothing of it: what results and facts are called, what words mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sparse_serve.gate.verdict import CheckResult

_TIMES = {"ttft": "time to the first token", "itl": "time between tokens", "e2e": "time to the whole answer"}
_RATES = {"throughput": "tokens per second", "goodput": "answers in time per second"}

_FACTS = {
    "created": "measured",
    "data": "texts",
    "base_matches": "the candidate was made from this base",
    "base_created": "base measured",
    "candidate_created": "candidate measured",
    "instructions": "instruction sets",
    "cores": "processor cores",
    "threads": "threads (OMP_NUM_THREADS)",
    "system": "operating system",
    "dtype": "number format (dtype)",
    "flags": "flags of vllm serve",
}
_OF_A_TARGET = {
    "digest": "digest of the {}'s weights",
    "config_digest": "digest of the {}'s config.json, which has those of its weights",
    "pattern": "weights that the {} keeps, of how many",
    "mask_digest": "digest of which weights the {} keeps",
    "recipe_digest": "digest of the recipe that made the {}",
}

_WORDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("token", (), "A word or a piece of one. Models read and write tokens."),
    ("window", ("quality", "divergence", "parity"), "A piece of the text, some hundred tokens long."),
    (
        "perplexity",
        ("quality", "parity"),
        "How surprised a model is by a text: 20 means that it is as unsure of the next token as between 20 equally "
        "likely ones. Less is better.",
    ),
    (
        "nats",
        ("quality", "divergence"),
        "What predictions lose, as a natural logarithm of a probability. 0.01 nats per token more is about 1 % more "
        "perplexity.",
    ),
    (
        "KL divergence",
        ("divergence",),
        "How far one model's probabilities of the next token are from another's: 0 if they are the same.",
    ),
    (
        "confidence",
        ("quality", "divergence", "tasks", "speed"),
        "What was measured is a sample. A bound with 95 % confidence is one that the true value is beyond in one case "
        "of 20 at most.",
    ),
    ("point", ("tasks",), "One sample in a hundred: from 60 % to 58 % of the samples is 2 points worse."),
    (
        "McNemar's p",
        ("tasks",),
        "The chance of losing so many samples by luck, by a candidate that is no worse. Close to 0: it is worse.",
    ),
    (
        "served, offline",
        ("parity",),
        "Served: as a running server (vLLM) answers. Offline: computed by another library (transformers) from the "
        "same files.",
    ),
    (
        "sparse, dense",
        ("kernels", "memory"),
        "A sparse layer keeps only some of its weights, in the pattern 2:4 two of four; a dense one keeps all.",
    ),
    ("kernel", ("kernels",), "The piece of code that multiplies numbers with the weights of a layer."),
    ("client", ("speed",), "Sends a request, waits for the answer, sends the next. Four clients: four at a time."),
    ("round", ("speed",), "Four runs under the same load, one after the other: base, candidate, candidate, base."),
    ("digest", (), "A fingerprint of data: two that are the same are of the same data."),
)


def title(result: CheckResult) -> str:
    """What a result is of, in words that need no knowledge of the gate."""
    check, subject = result.check, result.subject
    first, _, rest = subject.partition(", ")
    if not subject:
        return {"memory": "Memory of the sparse layers"}.get(check, check.capitalize())
    if check == "divergence" and rest:
        return f"Predictions: {'KL divergence' if first == 'kl' else 'other first choices'} on {rest}"
    if check == "speed" and rest:
        return f"Speed: {metric(first)}, {rest}"
    forms = {
        "quality": f"Quality: perplexity on {subject}",
        "parity": f"Parity: served against offline, on {subject}",
        "kernels": f"Kernels: {subject}",
        "tasks": f"Task: {subject}",
    }
    return forms.get(check, f"{check.capitalize()}: {subject}")


def metric(name: str) -> str:
    """`ttft_p50` in words, with its name."""
    what, _, percentile = name.partition("_p")
    if what in _RATES:
        return f"{_RATES[what]} ({name})"
    share = "median" if percentile == "50" else f"{percentile} % of cases take no longer"
    return f"{_TIMES.get(what, what)}, {share} ({name})"


def facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Provenance and environment under names that say what they are."""
    for name, value in found.items():
        role, _, kind = name.partition("_")
        label = _OF_A_TARGET[kind].format(role) if kind in _OF_A_TARGET else _FACTS.get(name, name)
        yield label, ("yes" if value else "no") if isinstance(value, bool) else str(value)


def words(checks: Iterable[str]) -> list[tuple[str, str]]:
    """The words that results of these checks use, and what they mean."""
    used = set(checks)
    return [(word, meaning) for word, by, meaning in _WORDS if not by or used.intersection(by)]

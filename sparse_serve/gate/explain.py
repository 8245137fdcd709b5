"""What each kind of result means, and what to do about it: for `gate explain` and the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sparse_serve.gate.verdict import CheckResult, Verdict, worst, worst_first

MEANING = {
    "measurement": "What the gate measured. It ended before there was anything to judge.",
    "quality": "How much worse the candidate predicts held-out text. Perplexity, of which less is better, is compared "
    "window by window.",
    "divergence": "How far the candidate's predictions of the next token are from the base's, whether better or worse. "
    "kl: by probabilities, 0 if they are the same; flips: how often it would choose another token.",
    "parity": "Whether the server computes what the same weights compute offline. A "
    "difference beyond rounding is a bug.",
    "kernels": "Whether each kernel computes what the sparse layers it serves stand for, up to rounding.",
    "memory": "Whether the sparse layers, which store only the weights they keep, are as small in the running "
    "server as in their files.",
    "speed": "How much longer clients wait for the candidate, in runs that alternate with the base. ttft: until the "
    "first token; itl: from one token to the next; e2e: for the whole answer; p50: in half of the cases it is less.",
    "tasks": "Whether the candidate answers as many samples correctly as the base, sample by sample.",
    "coverage": "Whether both reports measured the same texts, tasks and loads. What only one of them has is "
    "not compared.",
    "environment": "Whether two reports were measured alike: processor, versions, dtype.",
}

_MEND = "Mend what failed, and run the gate again."
NEXT = {
    (
        "quality",
        Verdict.FAIL,
    ): "Keep more layers dense, or prune with a better recipe; or allow more (max_ppl_increase).",
    ("quality", Verdict.INCONCLUSIVE): "Give more text, or more windows of it (max_windows).",
    (
        "divergence",
        Verdict.FAIL,
    ): "The candidate is another model than the base; allow it (max_kl, max_flips) if wanted.",
    ("divergence", Verdict.INCONCLUSIVE): "Give more text, or more windows of it (max_windows).",
    ("parity", Verdict.FAIL): "Find the layer: sparse-serve doctor checks the masks, dtype float32 rules out rounding. "
    "Where the target rounds activations to int8 by its flags, allow more: quality.parity_tolerance.",
    (
        "kernels",
        Verdict.FAIL,
    ): "Do not ship it, and report the layer and the processor as a bug. Another kernel may be right: "
    """--additional-config '{"sparse_nm": {"kernel": "reference"}}' as a flag of the target.""",
    ("memory", Verdict.FAIL): "See which kernels serve the layers: sparse-serve doctor.",
    ("speed", Verdict.FAIL): "Measure kernels: sparse-serve tune, sparse-serve doctor; or allow more (max_slowdown).",
    ("speed", Verdict.INCONCLUSIVE): "Quieten the host, or raise budget_s; gate run --calibrate says what it can tell.",
    ("tasks", Verdict.FAIL): "Keep more layers dense, or prune with a better recipe; or allow more (max_drop).",
    ("tasks", Verdict.INCONCLUSIVE): "Give more samples.",
    ("coverage", Verdict.INCONCLUSIVE): "Measure the same in both, or record the earlier one again.",
    ("environment", Verdict.INCONCLUSIVE): "Measure both in one run: gate run with the two as base and candidate.",
}

_VERDICT = {
    Verdict.PASS: "The candidate may replace the base: every check is within its limit, with confidence.",
    Verdict.INCONCLUSIVE: "Nothing is shown to be worse, and not everything is shown to be within its limit.",
    Verdict.FAIL: "The candidate is worse than allowed, with confidence.",
    Verdict.ERROR: "Something could not be measured, so nothing is decided.",
}


def headline(verdict: Verdict) -> str:
    """A verdict as a sentence."""
    return _VERDICT[verdict]


def next_step(check: str, verdict: Verdict) -> str:
    """What to do about a result; empty if nothing."""
    return NEXT.get((check, verdict), _MEND if verdict is Verdict.ERROR else "")


def causes(results: Iterable[CheckResult]) -> list[CheckResult]:
    """The results that a verdict other than a pass is owed to."""
    found = list(results)
    decided = worst(found)
    return [] if decided is Verdict.PASS else [result for result in worst_first(found) if result.verdict is decided]


def explain(report: Mapping[str, Any]) -> Iterator[str]:
    """A report (`report_file.load`) as lines for people, the worst results first."""
    verdict = Verdict(report["verdict"])
    provenance = report["provenance"]
    yield f"{verdict.value.upper()}: {headline(verdict)}"
    yield f"base {provenance.get('base', '?')}, candidate {provenance.get('candidate', '?')}"
    for result in worst_first(map(CheckResult.of, report["results"])):
        yield ""
        yield f"{result.verdict.value.upper()}  {result.name}"
        yield f"  {result.summary}"
        yield f"  what it is: {MEANING.get(result.check, 'a check of another version')}"
        advice = next_step(result.check, result.verdict)
        if advice:
            yield f"  next: {advice}"

"""What a person sees of measurements: of `maskgen eval`, and of the quality of what a run made."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskgen.api.measuring import EvaluateResult
from maskgen.cli.display import say
from maskgen.cli.parser import in_flags
from maskgen.core.quality import Quality


def print_evaluated(result: EvaluateResult) -> None:
    """The perplexity with its protocol; as a table for several texts, or beside a dense model."""
    first = result.texts[0].perplexity
    windows = sum(len(text.perplexity.nll_per_window) for text in result.texts)
    scored = sum(sum(text.perplexity.scored_tokens_per_window) for text in result.texts)
    if len(result.texts) == 1 and result.against is None:
        say(f"perplexity {first.value:.4f}")
    else:
        Console().print(_evaluated_table(result))
    say(f"  {windows} windows, {scored} scored tokens, {first.protocol.describe()}, {result.dtype}")
    if result.against is not None:
        say(f"  dense: {result.against}; KL(dense || model) in nats per token; top-1: the same token is the likeliest")


def _evaluated_table(result: EvaluateResult) -> Table:
    table = Table()
    table.add_column("text", overflow="fold")
    for heading in ("windows", "perplexity", *(("dense", "KL", "top-1") if result.against is not None else ())):
        table.add_column(heading, justify="right")
    for text in result.texts:
        cells = [str(len(text.windows)), f"{text.value:.4f}"]
        if text.dense is not None and text.divergence is not None:
            cells += [f"{text.dense.value:.4f}", f"{text.divergence.kl:.4f}", f"{text.divergence.agreement:.2%}"]
        table.add_row(Text(text.text), *cells)
    return table


def print_quality(quality: Quality | str) -> None:
    """What was measured on held-out text, with advice if it is bad; or why nothing was."""
    first, *others = [f"not measured: {in_flags(quality)}"] if isinstance(quality, str) else quality.lines()
    say(f"quality: {first}")
    for line in others:
        say(f"  {line}")

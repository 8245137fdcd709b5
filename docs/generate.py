"""Makes `docs/reference/` of the code that it describes, and the tables of README and the manual of the records that
they are about: `make reference`, or `python docs/generate.py`.

Flags come from the parsers, settings from their pydantic model, metrics from their registry, errors from their classes
and the table of statuses, recipes and `gate.yaml` from the files that are shipped; tables and README's picture from
`tests/bench/results`. All of it is committed, so that it can be read where the repository is; tests make it again and
compare.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

from prometheus_client import CollectorRegistry

from maskgen.cli.parser import build_parser
from maskgen.core import errors as core_errors
from maskgen.core.errors import SparseError
from sparse_serve.cli import main as serve_cli
from sparse_serve.runtime import errors as serve_errors
from sparse_serve.server.metrics import Metrics
from sparse_serve.server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[1]
OUT_DIR = ROOT / "docs" / "reference"
_NOTE = "<!-- made by docs/generate.py; change what it is made of, then `make reference` -->\n\n"

_MAKER = """Exit status: 0 done, 2 something that you can mend (one line says what), 130 interrupted, 1 nobody reads the
output any more.
"""
_SERVER = """# sparse-serve

Exit status: 0 fine, 2 wrong usage or input, 130 interrupted, 141 nobody reads the output any more; 1 if the engine died
(`serve`), a gate failed (its others are 3 and 4), or a dense model would be faster somewhere (`doctor`).

`serve` has [settings](settings.md), too, and takes every flag of `vllm serve`.
"""
_SETTINGS = """# Settings of the server

A setting of `sparse-serve serve` is a flag and an environment variable; the flag goes first. `--no-NAME` is false. What
is not legal, and a variable with that prefix which is no setting, ends the start. Flags of `vllm serve` are taken
beside these.
"""
_METRICS = """# Metrics

`/metrics` of the HTTP port has these beside vLLM's own, which keep vLLM's names (`vllm:...`). Times are in seconds,
sizes in bytes. What the labels mean is in [running a server](../production.md#metrics-and-traces).
"""
_ERRORS = """# Errors

Every error that is raised on purpose. Each is also a standard exception, so that a caller can catch it by that. A
message is one line: what is wrong, the value, what was expected, what to do next. The commands print it and end with
status 2. Where an error is the answer to a request, the table has its HTTP status and gRPC code; any other error of the
server is 500 and INTERNAL, with an id under which the log has the rest.
"""
_GATE_YAML = """# gate.yaml

What `sparse-serve gate init` writes: every key, explained. [Gate](../gate.md) says what is judged, and how.
"""


def generate() -> dict[str, str]:
    """Every page: file name -> text."""
    pages = {
        "maskgen.md": _maskgen(),
        "sparse-serve.md": _sparse_serve(),
        "settings.md": _settings(),
        "metrics.md": _metrics(),
        "errors.md": _errors(),
        "recipes.md": _recipes(),
        "gate-yaml.md": _gate_yaml(),
    }
    return {name: _NOTE + re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n" for name, text in pages.items()}


def _maskgen() -> str:
    parser = build_parser()
    return f"# maskgen\n\n{parser.description}\n\n{_MAKER}\n" + "".join(_verbs(parser))


def _sparse_serve() -> str:
    text = f"{_SERVER}\n"
    for verb, description in serve_cli._VERBS.items():
        parser = argparse.ArgumentParser(prog=f"sparse-serve {verb}", description=description)
        importlib.import_module(f"sparse_serve.cli.{verb}").add_arguments(parser)
        text += _page_of(parser)
    return text


def _verbs(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (_page_of(verb) for verb in action.choices.values())


def _page_of(parser: argparse.ArgumentParser) -> str:
    """A verb's section: what it does, its arguments, and the verbs below it."""
    rows = [_argument(parser, action) for action in parser._actions if _is_shown(action)]
    text = f"## {parser.prog}\n\n{_escaped(_sentence(parser.description or ''))}\n\n"
    text += _table(("argument", "what it is"), rows) if rows else ""
    if parser.epilog:
        text += _escaped(_sentence(" ".join(parser.epilog.split()))) + "\n\n"
    return text + "".join(_verbs(parser))


def _is_shown(action: argparse.Action) -> bool:
    is_setting = action.dest in Settings.model_fields and action.default is argparse.SUPPRESS
    return not isinstance(action, argparse._HelpAction | argparse._SubParsersAction) and not is_setting


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    formatter = argparse.HelpFormatter(parser.prog)
    value = formatter._format_args(action, (action.metavar or action.dest.upper()))  # type: ignore[arg-type]
    name = ", ".join(action.option_strings) if action.option_strings else ""
    what = formatter._expand_help(action) if action.help else ""
    required = " (required)" if action.required and action.option_strings else ""
    return f"`{f'{name} {value}'.strip()}`".replace("|", "\\|"), _escaped(what + required)


def _settings() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        limits = {
            kind: getattr(rule, kind) for rule in field.metadata for kind in ("ge", "gt", "le") if hasattr(rule, kind)
        }
        low = f"{limits['ge']} to " if "ge" in limits else f"above {limits['gt']}, to " if "gt" in limits else ""
        legal = f"{low}{limits['le']}" if "le" in limits else "true or false" if field.annotation is bool else "text"
        default = "" if field.default == "" else f"`{field.default}`"
        flag = "--" + name.replace("_", "-")
        rows.append((f"`{flag}`", f"`{ENV_PREFIX}{name.upper()}`", default, legal, _escaped(field.description or "")))
    return f"{_SETTINGS}\n" + _table(("flag", "variable", "default", "legal", "what it is"), rows)


def _metrics() -> str:
    registry = CollectorRegistry()
    made = Metrics(registry)
    labels = {metric._name: metric._labelnames for metric in vars(made).values() if hasattr(metric, "_labelnames")}
    rows = []
    for metric in sorted(registry.collect(), key=lambda metric: metric.name):
        name = metric.name + ("_total" if metric.type == "counter" else "")
        shown = ", ".join(f"`{label}`" for label in labels[metric.name])
        rows.append((f"`{name}`", metric.type, shown, _escaped(metric.documentation)))
    return f"{_METRICS}\n" + _table(("metric", "type", "labels", "what it counts"), rows)


def _errors() -> str:
    rows = []
    for module in (core_errors, serve_errors):
        for kind in vars(module).values():
            if inspect.isclass(kind) and issubclass(kind, SparseError) and kind.__module__ == module.__name__:
                standard = [
                    base.__name__ for base in kind.__bases__ if base.__module__ == "builtins" and base is not Exception
                ]
                ours = [base.__name__ for base in kind.__bases__ if base.__module__ != "builtins"]
                rows.append(
                    (
                        f"`{kind.__name__}`",
                        ", ".join(f"`{base}`" for base in ours + standard),
                        _status(kind),
                        _escaped(inspect.getdoc(kind) or ""),
                    )
                )
    return f"{_ERRORS}\n" + _table(("error", "is a", "answer", "when"), rows)


def _status(kind: type[SparseError]) -> str:
    for listed, code, status, retry_s in serve_errors._TABLE:
        if issubclass(kind, listed):
            return f"{status}, {code}" + (f"; again after {retry_s:g} s" if retry_s else "")
    return ""


def _recipes() -> str:
    folder = resources.files("maskgen.recipes")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    doc = inspect.getdoc(importlib.import_module("maskgen.recipes.recipe")) or ""
    text = f"# Recipes\n\n{doc}\n\n"
    sections = importlib.import_module("maskgen.recipes.sections")
    for name, model in (("train", sections.Training), ("values", sections.Values), ("budget", sections.Budget)):
        text += f"## [{name}]\n\n{_escaped(' '.join((inspect.getdoc(model) or '').split()))}\n\n"
        rows = [
            (f"`{key}`", "to be given" if field.is_required() else f"`{field.default!r}`")
            for key, field in model.model_fields.items()
        ]
        text += _table(("key", "default"), rows)
    for file in files:
        text += f"## {file.name.removesuffix('.toml')}\n\n```toml\n{file.read_text('utf-8').rstrip()}\n```\n\n"
    return text


def _gate_yaml() -> str:
    text = resources.files("sparse_serve.gate").joinpath("gate.yaml").read_text("utf-8")
    return f"{_GATE_YAML}\n```yaml\n{text.rstrip()}\n```\n"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "")) and text.endswith(".") else ".")


def _escaped(text: str) -> str:
    """Text for a cell: Markdown's marks outside of `code` stand for themselves."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        piece.replace("|", "\\|") if piece.startswith("`") else re.sub(r"([*<|\[\]])", r"\\\1", piece)
        for piece in pieces
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in lines).replace("| --- ", "|---").replace("--- |", "---|")
        + "\n\n"
    )


def with_tables() -> dict[Path, str]:
    """README and every page of the manual that has tables of measurements: file -> its text with these made anew."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.bench import tables

    pages = {file: file.read_text("utf-8") for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
    return {file: tables.filled(text) for file, text in pages.items() if tables.names(text)}


def main() -> int:
    """Write all of it."""
    OUT_DIR.mkdir(exist_ok=True)
    pages = {OUT_DIR / name: text for name, text in generate().items()} | with_tables()
    for file, text in pages.items():
        file.write_text(text, "utf-8")
        sys.stdout.write(f"{file.relative_to(ROOT)}\n")
    from tests.bench import plots

    plots.PLOTS[plots.KERNELS](ROOT / "docs" / plots.KERNELS)
    sys.stdout.write(f"docs/{plots.KERNELS}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

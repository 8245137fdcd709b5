"""`gate.yaml`: two targets, what is measured of them, and what is allowed.

Read with YAML's safe loader. Unknown keys, wrong types, values out of range, keys given twice and aliases are a
`SettingsError` of one line that begins with the path of the key. Paths are relative to the file's folder.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from maskgen.core.errors import clip
from sparse_serve.gate import task_pack
from sparse_serve.gate.evidence import TARGETS, Limits
from sparse_serve.runtime.errors import SettingsError

VERSION = 1
_MAX_FILE_BYTES = 1 << 20
_DEFAULTS = Limits()
_METRIC = re.compile(r"throughput|goodput|(ttft|itl|e2e)_p([1-9]|[1-9]\d)")

DType = Literal["float32", "bfloat16", "float16"]


def _metric(name: str) -> str:
    if not _METRIC.fullmatch(name):
        raise ValueError("expected throughput, goodput, or ttft_pN, itl_pN or e2e_pN with a percentile N from 1 to 99")
    return name


def _once(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError("has an entry twice")
    return values


def _address(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+[^\s]*", url):
        raise ValueError("expected http:// or https://, a host, and no spaces")
    if "@" in urlsplit(url).netloc:
        raise ValueError("has a user or a password, which reports would show; set OPENAI_API_KEY instead")
    if "?" in url or "#" in url:
        raise ValueError("has a query or a fragment; expected an address that /v1/completions can follow")
    if urlsplit(url).port == 0:  # ValueError for a port that is none
        raise ValueError("port 0 is no port of a running server")
    return url


PathText = Annotated[Path, Field(strict=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Alpha = Annotated[float, Field(gt=0, lt=0.5, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TargetConfig(_Section):
    """A model directory, which the gate serves itself with `flags` of `vllm serve`, or a running server's address.

    A server speaks OpenAI's completions API and returns log-probabilities of the prompt; its key is read from the
    environment variable OPENAI_API_KEY. `name` is the model to ask it for, by default the first it names. `tokenizer`
    (a directory) is what `vllm bench serve` makes prompts with; by default that of the other target, if a directory.
    """

    model: PathText | None = None
    flags: list[str] = []
    url: Annotated[str, AfterValidator(_address)] | None = None
    name: str | None = None
    tokenizer: PathText | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> TargetConfig:
        if (self.model is None) == (self.url is None):
            raise ValueError("give either `model`, a directory, or `url`, a server's address")
        if self.url is None and (self.name or self.tokenizer):
            raise ValueError("`name` and `tokenizer` are for a target by `url`")
        if self.model is None and self.flags:
            raise ValueError("`flags` are for a target by `model`, which the gate serves itself")
        return self


class QualityConfig(_Section):
    """Perplexity, divergence and parity on held-out `texts`; `max_kl` and `max_flips` are judged where given.

    With two directories, windows are of `window_tokens` tokens (default: 2048, or half the base's context if that is
    less), and both stacks are measured: transformers and the server. With a `url`, or without `offline`, texts are
    plain UTF-8, cut into pieces of three characters for each of `window_tokens` (default: 512), and divergence is over
    the `top_k` most likely tokens.
    """

    texts: Annotated[list[PathText], Field(min_length=1), AfterValidator(_once)]
    max_ppl_increase: Annotated[float, Field(gt=-1, allow_inf_nan=False)] = _DEFAULTS.max_ppl_increase
    alpha: Alpha = _DEFAULTS.alpha
    max_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_flips: Annotated[float, Field(ge=0, le=1)] | None = None
    parity_tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    window_tokens: Annotated[int, Field(ge=2)] | None = None
    max_windows: Count | None = None
    bos: bool | None = None
    offline: bool = True
    top_k: Annotated[int, Field(ge=1, le=20)] = 20


class ResultsConfig(_Section):
    """A round that another load generator measured: files of runs of the base and of the candidate, under one load of
    `clients` requests at a time. As many of each; see `sparse_serve.gate.results` for their forms.
    """

    base: Annotated[list[PathText], Field(min_length=1), AfterValidator(_once)]
    candidate: Annotated[list[PathText], Field(min_length=1), AfterValidator(_once)]
    clients: Count = 1

    @model_validator(mode="after")
    def _as_many(self) -> ResultsConfig:
        if len(self.base) != len(self.candidate):
            raise ValueError(f"{len(self.base)} files of the base and {len(self.candidate)} of the candidate")
        return self


class SpeedConfig(_Section):
    """Rounds of base, candidate, candidate, base under the load of `vllm bench serve`, at each number of `clients`.

    With `results`, rounds are read from files and nothing is measured.

    Rounds are added until every metric is decided, for at most `budget_s` seconds. `goodput` is the rate of requests
    whose first token and whose end come within `slo_ttft_ms` and `slo_e2e_ms`, where given.
    """

    clients: Annotated[list[Count], Field(min_length=1), AfterValidator(_once)] = [1, 4]
    requests: Count = 4
    input_tokens: Count = 128
    output_tokens: Annotated[int, Field(ge=2)] = 64
    metrics: Annotated[list[Annotated[str, AfterValidator(_metric)]], Field(min_length=1), AfterValidator(_once)] = [
        "ttft_p50",
        "itl_p50",
        "e2e_p95",
        "throughput",
    ]
    max_slowdown: Fraction = _DEFAULTS.max_slowdown
    floor_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _DEFAULTS.floor_ms
    slo_ttft_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    slo_e2e_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    alpha: Alpha = _DEFAULTS.speed_alpha
    budget_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 900
    results: list[ResultsConfig] = []

    @model_validator(mode="after")
    def _goodput_has_an_slo(self) -> SpeedConfig:
        if "goodput" in self.metrics and self.slo_ttft_ms is None and self.slo_e2e_ms is None:
            raise ValueError("`goodput` needs `slo_ttft_ms`, `slo_e2e_ms` or both")
        return self


class TasksConfig(_Section):
    """Samples through servers: names of the pack, files of JSON lines, `lm_eval:NAME`, YAML files of lm_eval's tasks.

    See `sparse_serve.gate.tasks` for the form of a file, `task_pack` for the pack, and `lm_eval` for its tasks.
    """

    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_once)]
    max_samples: Count | None = None
    max_drop: Fraction = _DEFAULTS.max_task_drop
    alpha: Alpha = _DEFAULTS.task_alpha


class GateConfig(_Section):
    """Everything `sparse_serve.gate.run` needs. `dtype` is what directories compute in, by default the base's own.

    `allow_other_base` compares although a sparse candidate was not made from the base.
    """

    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    base: TargetConfig
    candidate: TargetConfig
    dtype: DType | None = None
    allow_other_base: bool = False
    quality: QualityConfig | None = None
    speed: SpeedConfig | None = None
    tasks: TasksConfig | None = None

    @model_validator(mode="after")
    def _something(self) -> GateConfig:
        if self.quality is None and self.speed is None and self.tasks is None:
            raise ValueError("nothing to measure; give `quality`, `speed` or `tasks`")
        return self

    @staticmethod
    def load(path: str | Path) -> GateConfig:
        """Read a file. Raises `SettingsError` for what is wrong with it, `OSError` if it cannot be read."""
        path = Path(path)
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise SettingsError(
                f"{path}: {path.stat().st_size} bytes; expected a gate.yaml of at most {_MAX_FILE_BYTES}"
            )
        try:
            value = yaml.load(path.read_bytes(), Loader=_StrictLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise SettingsError(f"{path}: is no YAML: {_one_line(error)}") from None
        if not isinstance(value, dict):
            raise SettingsError(
                f"{path}: holds {clip(value)}; expected keys (`sparse-serve gate init` writes an example)"
            )
        return GateConfig.of(value, str(path), path.parent)

    @staticmethod
    def of(value: dict[str, Any], where: str = "gate", folder: Path | None = None) -> GateConfig:
        """From keys and values, with paths relative to `folder`. `SettingsError` names the key, after `where`."""
        try:
            config = GateConfig.model_validate(value)
        except ValidationError as error:
            raise SettingsError(f"{where}: {_explain(error)}") from None
        return config if folder is None else config._below(folder)

    def calibration(self) -> GateConfig:
        """The base against itself, in speed alone: what the host can tell. `SettingsError` without `speed`."""
        if self.speed is None or self.speed.results:
            raise SettingsError(
                "speed: missing, or from files; a calibration measures the speed of the base against itself"
            )
        return self.model_copy(update={"candidate": self.base, "quality": None, "tasks": None})

    def recording(self) -> GateConfig:
        """The candidate alone, as both targets: what is kept to compare later ones with (`baseline`)."""
        if self.speed is not None and self.speed.results:
            raise SettingsError("speed.results: a recording measures; files of results are rounds of two targets")
        return self.model_copy(update={"base": self.candidate})

    def _below(self, folder: Path) -> GateConfig:
        def moved(target: TargetConfig) -> TargetConfig:
            paths = {name: getattr(target, name) for name in ("model", "tokenizer")}
            return target.model_copy(update={name: folder / path for name, path in paths.items() if path is not None})

        quality = self.quality
        if quality is not None:
            quality = quality.model_copy(update={"texts": [folder / text for text in quality.texts]})
        tasks = self.tasks
        if tasks is not None:
            is_name = {task for task in tasks.tasks if task in task_pack.NAMES or task.startswith("lm_eval:")}
            names = [task if task in is_name else str(folder / task) for task in tasks.tasks]
            tasks = tasks.model_copy(update={"tasks": names})
        speed = self.speed
        if speed is not None:
            files = [
                one.model_copy(update={role: [folder / path for path in getattr(one, role)] for role in TARGETS})
                for one in speed.results
            ]
            speed = speed.model_copy(update={"results": files})
        update = {"quality": quality, "tasks": tasks, "speed": speed}
        return self.model_copy(update={"base": moved(self.base), "candidate": moved(self.candidate), **update})


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, without aliases (which make a small file large) and without keys given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{clip(key.value)} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: ValidationError) -> str:
    """The first problem as one line, which begins with the path of its key."""
    problem = error.errors(include_url=False)[0]
    path = ""
    for part in problem["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    if problem["type"] == "missing":
        return f"{path}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if isinstance(problem["input"], dict | BaseModel):
        return f"{path}: {message}" if path else message
    return f"{path}: {clip(problem['input'])}: {message}"

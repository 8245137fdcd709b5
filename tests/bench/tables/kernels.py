"""Speed of single layers: on CPUs, on a GPU, and beside a dense kernel of the same care."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from sparse_serve.kernels import skinny
from tests.bench import record
from tests.bench.tables.cells import markdown, spread

COMMIT = "2f5c746"
"""Of the runs with AVX-512, which README and results.md name."""

TOKENS = ("1", "4", "16", "32", "64", "256", "1024")
_HEAD = ("tokens: 1", *TOKENS[1:])
_AMX = {"cpu": "bfloat16, in tiles", "cpu int8": "int8", "cpu avx512": "bfloat16, by AVX-512"}
_QUANTISED = {
    "dense torch": "torch, bfloat16",
    "dense vllm": "vLLM, bfloat16",
    "vllm W8A8": "vLLM W8A8",
    "vllm W4A16": "vLLM W4A16",
    "vllm W4A8": "vLLM W4A8",
    "cpu": "2:4, bfloat16 values",
    "cpu int8": "2:4, int8 values",
    "cpu int4": "2:4, int4 values",
    "cpu_int8 int8": "2:4, int8 values, int8 activations",
    "cpu_int8 int4": "2:4, int4 values, int8 activations",
}
_DENSE_PEERS = ("own dense", "torch dense", "vllm dense", "vllm dense float32", "read of the 2:4 bytes")

Speedups = dict[tuple[str, str, str], dict[int, list[float]]]
"""By shape, dtype of activations and kind of values: of every run, by number of tokens."""


def speedups(model: str) -> Speedups:
    """Over the faster dense layer, of the runs at `COMMIT`."""
    found: Speedups = defaultdict(lambda: defaultdict(list))
    for run in record.load("kernels", model):
        for result in run["results"] if str(run["commit"]).startswith(COMMIT) else []:
            for name, values in (("cpu", run["dtype"]), ("cpu int8", "int8")):
                kind = (f"{result['out_features']} x {result['in_features']}", run["dtype"], values)
                if name in result["speedup"]:
                    found[kind][result["tokens"]].append(result["speedup"][name])
    return found


def cpu(dtypes: tuple[str, ...]) -> str:
    """Lowest and highest of the runs with two threads."""
    rows = []
    for dtype in dtypes:
        for (shape, _, values), by_tokens in speedups(f"cpu-{dtype}-2threads").items():
            if (dtype, values) != ("float16", "int8"):  # no more than float32's, against dense layers as slow
                rows.append([shape, dtype, values, *(spread(found) for _, found in sorted(by_tokens.items()))])
    return markdown(("out x in", "activations", "values", *_HEAD), rows, texts=3)


def small() -> str:
    """Layers of small models, one run, without int8 values."""
    rows = [
        [shape, *(spread(found) for _, found in sorted(by_tokens.items()))]
        for (shape, _, values), by_tokens in speedups("cpu-bfloat16-2threads-small").items()
        if values != "int8"
    ]
    return markdown(("out x in", *_HEAD), rows)


def amx() -> str:
    """One run on a processor with AMX."""
    (run,) = record.load("kernels", "cpu-bfloat16-2threads-amx")
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, values in _AMX.items():
        for result in run["results"]:
            rows[f"{result['out_features']} x {result['in_features']}", values].append(f"{result['speedup'][name]:.2f}")
    shapes = dict.fromkeys(shape for shape, _ in rows)
    ordered = [[shape, values, *rows[shape, values]] for shape in shapes for values in _AMX.values()]
    return markdown(("out x in", "values", *_HEAD), ordered, texts=2)


def quantised(model: str) -> str:
    """Milliseconds of every candidate of one run, and how many times faster the last are than the fastest dense one."""
    (run,) = record.load("kernels", model)
    by_shape: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in run["results"]:
        by_shape[f"{result['out_features']} x {result['in_features']}"].append(result)
    rows = []
    for shape, results in by_shape.items():
        for name, label in _QUANTISED.items():
            if name not in results[0]["median_s"]:
                continue  # vLLM has int4 layers of one kind at a time
            label = label.replace("bfloat16", run["dtype"])
            rows.append([shape, label, *(f"{1e3 * result['median_s'][name]:.2f}" for result in results)])
        for name in ("cpu_int8 int8", "cpu_int8 int4"):
            dense = [min(result["speedup_over"].values(), key=lambda over: over[name])[name] for result in results]
            label = f"{_QUANTISED[name]}: times faster than the fastest dense layer"
            rows.append([shape, label, *(f"**{ratio:.2f}**" for ratio in dense)])
    tokens = [str(result["tokens"]) for result in run["results"][: len(run["results"]) // len(by_shape)]]
    return markdown(("out x in", "layer", f"tokens: {tokens[0]}", *tokens[1:]), rows, texts=2)


def own_dense() -> str:
    """Time of each candidate by that of 2:4, one token; lowest and highest of the runs."""
    found: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in record.load("own-dense", "cpu"):
        for result in run["results"]:
            for name, ratio in result["time_by_ours"].items():
                found[-run["threads"], "{} x {}".format(*result["shape"])][name].append(ratio)
    ordered = sorted(found.items(), key=lambda entry: (entry[0][0], -len(entry[0][1])))
    rows = [
        [shape, str(-threads), *(spread(ratios[name]) for name in _DENSE_PEERS)] for (threads, shape), ratios in ordered
    ]
    head = ("out x in", "threads", "the dense one", "torch", "vLLM", "vLLM, float32", "reading the 2:4 bytes")
    return markdown(head, rows)


def gpu() -> str:
    """The four layers of a block by torch's dense ones; `skinny` as sums of calls with the split that it chooses."""
    timed = record.load("gpu-kernels", "block-bfloat16")[-1]["shapes"]
    (splits,) = record.load("gpu-skinny-splits", "block-bfloat16")
    rows = []
    for tokens in ("1", "8", "16", "32", "64", "512", "2048"):
        dense_s = sum(shape["graph_s"][tokens]["dense"] for shape in timed.values())
        times = {
            name: sum(shape["graph_s"][tokens][name] for shape in timed.values())
            for name in ("dense fp8", "cusparselt")
        }
        chosen = ["", ""]
        if int(tokens) <= 64:
            chosen = [f"{dense_s / _split_s(splits, timed, name, tokens):.2f}" for name in ("skinny", "skinny int8")]
        ratios = {name: f"{dense_s / each_s:.2f}" for name, each_s in times.items()}
        rows.append([tokens, f"{1e6 * dense_s:.0f}", ratios["dense fp8"], *chosen, ratios["cusparselt"]])
    head = ("tokens", "dense bf16, us", "dense fp8", "`skinny`, bf16 values", "`skinny`, int8 values", "`cusparselt`")
    return markdown(head, rows, texts=0)


def _split_s(splits: dict[str, Any], timed: dict[str, Any], name: str, tokens: str) -> float:
    total_s = 0.0
    for shape, times in splits["shapes"].items():
        strips, chunks = -(-timed[shape]["out_features"] // 16), -(-timed[shape]["in_features"] // 256)
        total_s += times[name][tokens]["{}x{}".format(*skinny.split(int(tokens), strips, chunks))]
    return total_s


TABLES = {
    f"kernels at {COMMIT}, bfloat16": partial(cpu, ("bfloat16",)),
    f"kernels at {COMMIT}": partial(cpu, ("bfloat16", "float32", "float16")),
    f"small layers at {COMMIT}": small,
    "kernels with AMX": amx,
    "kernels beside quantised dense layers": partial(quantised, "cpu-bfloat16-2threads-quantised"),
    "kernels beside quantised dense layers, with AMX": partial(quantised, "cpu-bfloat16-2threads-quantised-amx"),
    "kernels beside quantised dense layers, with AVX2": partial(quantised, "cpu-bfloat16-2threads-quantised-avx2"),
    "kernels in float32 beside quantised dense layers, with AVX2": partial(
        quantised, "cpu-float32-2threads-quantised-avx2"
    ),
    "a dense kernel of the same care": own_dense,
    "kernels on an H200": gpu,
}

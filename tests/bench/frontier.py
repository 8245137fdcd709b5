"""Why 2:4 at all? Quality against bytes and decoding speed: `python -m tests.bench.frontier`, or `make frontier`.

The points are the dense model, sparse checkpoints made from it (`--points NAME=DIR ...`, each also with int8 values),
and what a user would pick instead: the dense model with integer weights (`tests.bench.peers`). Every one is scored by
the same `maskgen eval` against the dense model, on the same windows. With `--speed` they are served, too (or those that
it names: all servers are up at a time), beside the peers that vLLM serves here. They take turns under load in one run,
as with `sparse-serve bench serve --peers`; sparse ones with integer values are there a second time, with activations
rounded to int8.

Quality of every point has a result file of its own and is not measured again while its weights, texts and windows are
the same, so the chart can be made in pieces and added to; speed has one file, of one run with all of them. `--table`
prints what there is; `--plot FILE.svg` draws it.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskgen.core.checkpoint import TensorHeader, is_sparse_checkpoint, read_headers
from maskgen.core.digest import digest_files, digest_json, digest_weights
from maskgen.core.errors import SparseError
from maskgen.core.files import read_json
from sparse_serve.bench import field, field_report
from sparse_serve.runtime.errors import BenchError
from tests.bench import frontier_chart, peers, quality, record

WHAT = "frontier"
DENSE = "dense bfloat16"
INT8 = "int8 values"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, then print the table. 2 for wrong usage or input, 1 where speed cannot be measured."""
    args = _arguments(arguments)
    try:
        points = _points(args)
        facts = {
            "model_digest": digest_weights(args.model),
            "eval_digest": digest_files(args.eval),
            "window_tokens": args.window,
            "max_windows": args.windows,
            "dtype": args.dtype,
        }
        keys = {DENSE: _key(facts, {})}
        keys |= {name: _key(facts, _peer_facts(args, name)) for name in args.peers}
        keys |= {name: _key(facts, {"weights": digest_weights(path)}) for name, path in points.items()}
        timed = _timed(args, points)
        speed_key = _speed_key(args, timed)
    except (SparseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    failure = None
    if not args.table:
        for name, key in keys.items():
            _measure(args, name, points.get(name), key, facts)
        try:
            if timed:
                _measure_speed(args, timed, speed_key)
        except SparseError as error:  # of a server: quality, which has been measured, is shown
            failure = error
    found = {result["key"]: result for result in record.load(WHAT, args.label)}
    shown = {name: found[key] for name, key in keys.items() if key in found}
    speeds = frontier_chart.speeds(found[speed_key]) if speed_key in found else {}
    print(frontier_chart.markdown(shown, speeds))  # noqa: T201
    if args.plot and shown:
        frontier_chart.plot(shown, speeds, args.plot)
    if failure:
        print(f"error: {failure}", file=sys.stderr)  # noqa: T201
    return 1 if failure else 0


def linear_bytes(model_dir: Path, dense_dir: Path) -> tuple[int, int]:
    """Bytes that a directory stores for what `dense_dir` has in the linear layers of its blocks, and for everything.

    What is outside of these layers takes as much in both, so whatever else a checkpoint has belongs to them: masks,
    scales, corrections, layers that stayed dense.
    """
    layers = {f"{name}.weight" for targets in peers.linears(dense_dir).targets for name in targets}
    outside = sum(_bytes(header) for name, header in read_headers(dense_dir).items() if name not in layers)
    total = sum(map(_bytes, read_headers(model_dir).values()))
    return total - outside, total


def _bytes(header: TensorHeader) -> int:
    """Of a tensor. The name of a dtype has its bits: BF16, I8, F8_E4M3."""
    return math.prod(header.shape) * int(re.findall(r"\d+", header.dtype)[0]) // 8


def _points(args: argparse.Namespace) -> dict[str, Path]:
    """The sparse checkpoints by name, those with int8 values included, which are made here."""
    points: dict[str, Path] = {}
    for word in args.points:
        name, _, given = word.partition("=")
        path = Path(given)
        if not name or not is_sparse_checkpoint(path):
            raise SparseError(f"--points {word}: expected NAME=DIR of a sparse checkpoint")
        points[name] = path
        section = read_json(path / "config.json")["quantization_config"]
        if section["values"] == "float" and args.int8:
            small = args.work / f"{path.name}-int8-{digest_weights(path)[7:15]}"
            if not small.exists():
                quality.maskgen(["quantise", str(path), "--values", "int8", "--out", str(small)])
            points[f"{name}, {INT8}"] = small
    return points


def _key(facts: dict[str, Any], more: dict[str, Any]) -> str:
    return digest_json({**facts, **more})


def _peer_facts(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What decides a peer's weights, beside the dense model."""
    scheme = peers.PEERS[name]
    used: dict[str, Any] = {"scheme": vars(scheme)}
    if scheme.gptq:
        used["calibration"] = [digest_files(args.calibrate), args.samples, args.calibration_window]
    return used


def _measure(args: argparse.Namespace, name: str, path: Path | None, key: str, facts: dict[str, Any]) -> None:
    if any(result["key"] == key for result in record.load(WHAT, args.label)):
        return
    result: dict[str, Any] = {"key": key, "point": name, **facts}
    if name == DENSE:
        linear, total = linear_bytes(args.model, args.model)
        scores = quality.score(args, args.model)
        scores |= {
            what: dict.fromkeys(scores["perplexity"], value) for what, value in (("kl", 0.0), ("agreement", 1.0))
        }
    elif path is None:
        path = args.work / f"peer-{key[7:15]}"
        if not path.exists():
            calibration = peers.Calibration(args.calibrate, args.samples, args.calibration_window)
            peers.write(args.model, path, peers.PEERS[name], calibration)
        dense_linear, dense_total = linear_bytes(args.model, args.model)
        linear = peers.stored_bytes(args.model, peers.PEERS[name])
        total = dense_total - dense_linear + linear
        scores = quality.score(args, path, args.model)
        result["peer"] = _peer_facts(args, name)
    else:
        linear, total = linear_bytes(path, args.model)
        scores = quality.score(args, path, args.model)
        result["recipe"] = read_json(path / "maskgen_recipe.json") if (path / "maskgen_recipe.json").exists() else None
    whole = linear_bytes(args.model, args.model)
    sizes = {
        "linear_bytes": linear,
        "total_bytes": total,
        "dense_linear_bytes": whole[0],
        "dense_total_bytes": whole[1],
    }
    record.save(WHAT, args.label, {**result, **sizes, **scores})


def _timed(args: argparse.Namespace, points: Mapping[str, Path]) -> Mapping[str, Path]:
    """The sparse checkpoints to serve: those that `--speed` names, or all."""
    if args.speed is None:
        return {}
    if unknown := [name for name in args.speed if name not in points]:
        raise SparseError(f"--speed {unknown[0]!r}: no such point; there are {', '.join(map(repr, points))}")
    return {name: points[name] for name in args.speed or points}


def _speed_key(args: argparse.Namespace, points: Mapping[str, Path]) -> str:
    """Of the one run in which all are served."""
    loads = {name: getattr(args, name) for name in ("clients", "rounds", "requests", "tokens", "vllm_flags")}
    weights = {name: digest_weights(path) for name, path in points.items()}
    return digest_json({"model": digest_weights(args.model), "loads": loads, "weights": weights, "peers": args.peers})


def _measure_speed(args: argparse.Namespace, points: Mapping[str, Path], key: str) -> None:
    """Serve all that can be served, in turns. Raises `BenchError` as `field.run` does, and without the dense server."""
    if any(result["key"] == key for result in record.load(WHAT, args.label)):
        return
    request = field.FieldRequest(
        dense=args.model,
        sparse=tuple(points.values()),
        peers=("bf16", *peers.servers(args.model, args.peers)),
        clients=tuple(args.clients),
        rounds=args.rounds,
        requests=args.requests,
        input_tokens=(args.tokens,),
        output_tokens=args.tokens,
        keep_peers=args.work,
        vllm_flags=tuple(args.vllm_flags),
        int8_activations=True,
    )
    result = field.run(request, lambda text: print(text, file=sys.stderr))  # noqa: T201
    if not any(turn.name == frontier_chart.DENSE_SERVER for turn in result.turns):
        reason = result.refused.get("bf16") or result.refused.get(frontier_chart.DENSE_SERVER)  # at the start, or later
        raise BenchError(f"--speed: every speed is told by the dense model's, which could not be served: {reason}")
    sparse = {digest_weights(path): name for name, path in points.items()}
    named = {entry.name: peers.points_of(entry.name, args.peers) for entry in result.entries}
    named |= {entry.name: [sparse[entry.weights]] for entry in result.entries if entry.is_ours}
    named[frontier_chart.DENSE_SERVER] = [DENSE]
    record.save(WHAT, args.label, {"key": key, "points_of": named, "served": field_report.record(request, result)})


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="dense model directory")
    parser.add_argument("--label", required=True, help="names the model in the result files")
    parser.add_argument("--points", nargs="*", default=[], metavar="NAME=DIR", help="sparse checkpoints made from it")
    parser.add_argument("--no-int8", dest="int8", action="store_false", help="not each of them with int8 values, too")
    names = ", ".join(map(repr, peers.PEERS))
    parser.add_argument(
        "--peers", nargs="*", default=list(peers.PEERS), choices=peers.PEERS, metavar="PEER", help=f"(default: {names})"
    )
    parser.add_argument("--data", dest="eval", type=Path, nargs="+", required=True, help="texts to score")
    parser.add_argument("--calibrate", type=Path, nargs="*", default=[], help="texts for GPTQ, never scored")
    parser.add_argument("--samples", type=int, default=64, help="windows of them (default: %(default)s)")
    parser.add_argument("--calibration-window", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="where peers and int8 checkpoints are kept")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a scored window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=24, help="windows scored of each text (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of scoring (default: %(default)s)")
    parser.add_argument(
        "--speed", nargs="*", metavar="NAME", help="also serve these points, or all, beside each other in one run"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="loads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every server (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=4, help="of a client in a round (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt, and of an answer (default: %(default)s)")
    parser.add_argument("--vllm-flags", nargs="*", default=[], help="for every server, as one word each: --flag=value")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    parser.add_argument("--plot", type=Path, help="also draw it, as .svg or .png")
    args = parser.parse_args(arguments)
    if any(peers.PEERS[name].gptq for name in args.peers) and not args.calibrate:
        parser.error("GPTQ wants text: give it with --calibrate, or leave it out with --peers")
    args.work.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    raise SystemExit(main())

"""The tables that `gpu_kernels` ends with, from what it measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparse_serve.kernels import skinny

DENSE = "dense"
"""The name of torch's dense layer among candidates."""

_HEAD = "tokens  kernel      "


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The machine, failures and splits; calls by the host against graphs; speedups, which is what counts."""
    machine, shapes = results["machine"], results["shapes"]
    yield f"{machine['gpu']}, {machine['versions']}, copy {results['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    yield f"cuSPARSELt with an alpha per row of a bfloat16 weight: {machine['cusparselt_alpha_per_row']}"
    for name, shape in shapes.items():
        yield from (f"FAILED {name}: {what}: {error}" for what, error in shape["failed"].items())
        yield from _splits(name, shape)
    yield from _wall(shapes)
    yield from _speedups(shapes)


def _splits(name: str, shape: dict[str, Any]) -> Iterator[str]:
    for who, counts in shape["splits_s"].items():
        for count, times in counts.items():
            best = min(times, key=times.__getitem__)
            strips, chunks = -(-shape["out_features"] // 16), -(-shape["in_features"] // 256)
            chosen = "{}x{}".format(*skinny.split(count, strips, chunks, has_groups=who == "skinny int4"))
            found = f"best {best} {times[best] * 1e6:.1f} us, chosen {chosen} {times[chosen] * 1e6:.1f}"
            yield f"{name}, {who}, split at {count}: {found}"


def _wall(shapes: dict[str, Any]) -> Iterator[str]:
    yield "\nus of a call by the clock on the wall: made by the host / in a replayed graph"
    yield _HEAD + "".join(f"{name:>15}" for name in shapes)
    for count, who in _rows(shapes, "wall_s"):
        pairs = [shape["wall_s"][count].get(who) for shape in shapes.values()]
        cells = ["failed" if pair is None else f"{pair[0] * 1e6:.0f} / {pair[1] * 1e6:.0f}" for pair in pairs]
        yield f"{count:6}  {who:<12}" + "".join(f"{cell:>15}" for cell in cells)


def _speedups(shapes: dict[str, Any]) -> Iterator[str]:
    yield "\nspeedup over dense (above 1 is faster); TB/s: bytes of the weights over time; us: the block's four linears"
    yield _HEAD + "".join(f"{name:>9}" for name in shapes) + "    block  TB/s       us  dense us"
    for count, who in _rows(shapes, "graph_s"):
        times = [(shape["graph_s"][count].get(DENSE), shape["graph_s"][count].get(who)) for shape in shapes.values()]
        if who == DENSE or any(None in pair for pair in times):
            continue
        ratios = "".join(f"{dense / mine:9.2f}" for dense, mine in times)
        dense_s, mine_s = (sum(column) for column in zip(*times, strict=True))
        speed = sum(shape["bytes"][who] for shape in shapes.values()) / mine_s / 1e12
        row = f"{dense_s / mine_s:9.2f} {speed:5.2f} {mine_s * 1e6:8.1f}  {dense_s * 1e6:8.1f}"
        yield f"{count:6}  {who:<12}{ratios}{row}"


def _rows(shapes: dict[str, Any], table: str) -> Iterator[tuple[int, str]]:
    """Every number of tokens with every candidate that some shape has a time of."""
    for count in next(iter(shapes.values()))[table]:
        whos = [who for shape in shapes.values() for who in shape[table][count]]
        yield from ((count, who) for who in dict.fromkeys(whos))

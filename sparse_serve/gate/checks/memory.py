"""Memory: are the sparse layers really small in the running server?

Compares the bytes that are resident, as counted on the workers' tensors, with what pattern and dtype allow: kept values
plus one bit per weight. A server that decompressed its weights at load, or a kernel whose private layout is no smaller
than dense, fails.
"""

from __future__ import annotations

from sparse_serve.gate.evidence import Evidence, Limits
from sparse_serve.gate.verdict import CheckResult, Verdict
from sparse_serve.gate.wording import percent

LAYOUT_SLACK = 0.07
"""Room for a kernel's own layout above the stored form: a vendor's 8-bit 2:4 blob is 0.625 where we store 0.5625."""


def run(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Fail when resident bytes exceed the stored fraction of the dense bytes by more than `LAYOUT_SLACK`.

    Judged is a sparse candidate whose engine the gate started.
    """
    engine = evidence.candidate_engine
    if engine is None or evidence.packed_fraction is None:
        return []
    allowed = evidence.packed_fraction + LAYOUT_SLACK
    fraction = engine.sparse_weight_bytes / max(engine.dense_equivalent_bytes, 1)
    small = engine.sparse_layers > 0 and fraction <= allowed
    result = CheckResult(
        check="memory",
        verdict=Verdict.PASS if small else Verdict.FAIL,
        summary=f"{engine.sparse_layers} sparse layers hold {engine.sparse_weight_bytes / 1e6:.3g} MB, "
        f"{percent(fraction)} of what they would hold dense (as stored {percent(evidence.packed_fraction)}), "
        f"allowed {percent(allowed)}",
        numbers={
            "resident_bytes": float(engine.sparse_weight_bytes),
            "dense_equivalent_bytes": float(engine.dense_equivalent_bytes),
            "fraction": fraction,
        },
    )
    return [result]

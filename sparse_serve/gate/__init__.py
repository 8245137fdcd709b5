"""The regression gate: may this sparse model replace that dense one?

    from sparse_serve import gate
    report = gate.run(gate.GateRequest(dense="DENSE", sparse="SPARSE", data="heldout.txt"))
    report.verdict                      # Verdict.PASS, FAIL or INCONCLUSIVE

`runner` measures (both models, offline and through the served engine, on the same token windows), the files of
`checks/` judge, `report` holds the result. One check is one file; every file in the folder is run.
"""

from sparse_serve.gate.report import GateReport
from sparse_serve.gate.request import GateRequest, GateStep, OnStep
from sparse_serve.gate.verdict import Verdict

__all__ = ["GateReport", "GateRequest", "GateStep", "Verdict", "run"]


def run(request: GateRequest, on_step: OnStep | None = None) -> GateReport:
    """Measure both models and judge; takes minutes. Writes no file: `GateReport.write` does.

    `on_step` is called before each of the four measurements. Raises `SettingsError` or `FormatError` for what can be
    known to be wrong before measuring, and `GateError`, `EngineStartError` or `EngineDiedError` when it cannot measure.
    Environment variables are left as they were.
    """
    from sparse_serve.gate import runner  # torch, which a look at the request does not need

    return runner.run(runner.plan(request), on_step=on_step or (lambda step: None))

"""The regression gate: may this model replace that one, in quality and in speed?

    from sparse_serve import gate
    report = gate.run(gate.GateConfig.load("gate.yaml"))
    report = gate.run(gate.GateRequest(dense="DENSE", sparse="SPARSE", data="heldout.txt"))     # the short form
    report.verdict                      # Verdict.PASS, FAIL, INCONCLUSIVE or ERROR

`plan` checks what is asked, `runner` measures both targets, the files of `checks/` judge, `report` holds the result.
One check is one file; every file in the folder is run.
"""

from sparse_serve.gate.config import GateConfig
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.request import GateRequest, GateStep, OnStep
from sparse_serve.gate.verdict import Verdict

__all__ = ["GateConfig", "GateReport", "GateRequest", "GateStep", "Verdict", "run"]


def run(asked: GateConfig | GateRequest, on_step: OnStep | None = None) -> GateReport:
    """Measure both targets and judge; takes minutes. Writes no file: `GateReport.write` does.

    `on_step` is called before each measurement and while it goes on. Raises `SettingsError` or `FormatError` for what
    can be known to be wrong before measuring, and `GateError`, `BenchError`, `EngineStartError` or `EngineDiedError`
    when it cannot measure. Environment variables are left as they were.
    """
    from sparse_serve.gate import plan, runner  # torch, which a look at what is asked does not need

    return runner.run(plan.plan(asked), on_step=on_step or (lambda step: None))

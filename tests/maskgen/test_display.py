"""Progress where there is no terminal: lines, not too many."""

import pytest

from maskgen import display


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now_s)
    with display.bar() as bar:
        task = bar.add_task("training", total=50, note="")
        for step in range(1, 51):
            now_s += 1.0
            bar.update(task, completed=step, note=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"training {step}/50 loss {step}" for step in (10, 20, 30, 40, 50)]

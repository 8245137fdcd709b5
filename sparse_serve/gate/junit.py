"""A report as JUnit XML, which build servers show: a test case for each result.

A fail is a `failure`, an error an `error`, an inconclusive result `skipped` with its reason.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from sparse_serve.gate.report import GateReport
from sparse_serve.gate.verdict import Verdict

_ELEMENTS = {Verdict.FAIL: "failure", Verdict.ERROR: "error", Verdict.INCONCLUSIVE: "skipped"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: GateReport) -> str:
    """The XML document as text."""
    verdicts = [result.verdict for result in report.results]
    suite = ElementTree.Element(
        "testsuite",
        name="sparse-serve gate",
        tests=str(len(verdicts)),
        failures=str(verdicts.count(Verdict.FAIL)),
        errors=str(verdicts.count(Verdict.ERROR)),
        skipped=str(verdicts.count(Verdict.INCONCLUSIVE)),
    )
    for result in report.results:
        name = _printable(result.subject or result.check)
        case = ElementTree.SubElement(suite, "testcase", classname=f"gate.{result.check}", name=name)
        if result.verdict in _ELEMENTS:
            ElementTree.SubElement(case, _ELEMENTS[result.verdict], message=_printable(result.summary))
        else:
            ElementTree.SubElement(case, "system-out").text = _printable(result.summary)
    ElementTree.indent(suite)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suite, encoding="unicode")}\n'


def _printable(text: str) -> str:
    """The text without characters that XML cannot hold."""
    return _NOT_XML.sub("?", text)

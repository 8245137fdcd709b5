"""Checks: `run(evidence, limits) -> list[CheckResult]`, one file each, judged on measurations already made.

A check never measures and never imports another. It states what it compared, against which limit, and decides `pass`,
`fail` or, when the data cannot tell, `inconclusive`. Samples that are missing or no numbers are an `error`. There is
one result for each thing judged (a text, a metric under a load, a task), and none where nothing of its kind was
measured.
"""

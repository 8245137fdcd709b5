"""Checks: `run(evidence, limits) -> CheckResult`, one file each, judged on measurements already made.

A check never measures and never imports another. It states what it compared, against which limit, and decides `pass`,
`fail` or, when the data cannot tell, `inconclusive`.
"""

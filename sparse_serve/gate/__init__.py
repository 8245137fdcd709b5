"""The regression gate: may this sparse model replace that dense one?

`run` measures (both models, offline and through the served engine, on the same token windows), the files of `checks/`
judge, `report` writes. One check is one file; every file in the folder is run.
"""

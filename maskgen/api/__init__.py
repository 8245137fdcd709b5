"""The Python interface: a typed request in, a typed result out, events while it works. `maskgen.cli` only wraps it.

requests      what can be asked for: fields, their defaults, what is legal; imports neither torch nor transformers
pruning       `prune`, `learn`, `run`: dense model + recipe + text -> checkpoint
converting    `permute`, `compress`, `convert`, `decompress`: one directory -> another
quantising    `quantise`: codes in place of float values, the nearest or chosen by text
measuring     `evaluate`, `inspect`, `load`, `report`, `demo`
events        what a function says of its progress
checks        what is checked of every request before anything is loaded

Every function may raise `StorageError` and `OutOfMemoryError` too (`maskgen.core.failures`).
"""

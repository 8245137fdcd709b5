"""Which kernel serves a layer at which number of tokens, decided by measuring on this machine.

`measure` times the kernels, `selection` chooses and keeps what was measured, `dispatch` runs what was chosen.
"""

"""How fast and how small sparse is, against dense, on this machine.

`kernels.run` times linear layers, `serve.run` two models behind a server, `survey.examine` the layers of a checkpoint.
"""

"""Training: masks and weights that are learned by gradient descent over the whole model.

Start at `run` (what `maskgen run` does with a learned method), then `loop` and `step`.
"""

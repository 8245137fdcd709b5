"""maskgen: weights and text in, N:M masks and sparse checkpoints out.

    recipe + model + text --sweep--> masks (and weights, if the method changes them) --compress--> sparse checkpoint

The offline half of the project. Start at `methods` (what a pruning method is), then `sweep` (the driver that runs one
over a model block by block), then `cli`. Importing this package has no effects and imports neither torch nor
transformers; the verbs of `maskgen.cli` import what they use.
"""

"""One-shot pruning: a model is walked block by block, in constant memory, and every layer is solved once.

Start at `driver`. `permute` and `arrange` put hidden neurons in an order in which masks keep more.
"""

"""What pruning methods compute with: optimisers, noise, statistics, sharded tensors, heads and neurons as units.

Serving never needs any of it; what both packages need is in `maskgen.core`.
"""

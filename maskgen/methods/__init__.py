"""One pruning method per file; the file name is the method's name in a recipe, and it exports `METHOD`.

A method sees tensors: it imports `maskgen.core`, `maskgen.method`, torch and the standard library, never a sibling.
"""

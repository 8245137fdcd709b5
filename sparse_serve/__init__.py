"""Serves N:M sparse (and dense) Hugging Face checkpoints on vLLM, over HTTP and gRPC from one process.

Importing this package has no effects and needs no vLLM: the engine is imported when a server starts.
"""

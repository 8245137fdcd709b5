"""Hugging Face models: load one, find its blocks, run them, evaluate it, make a new one, read a sparse one."""

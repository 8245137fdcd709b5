"""Checkpoints as directories: compress, decompress, quantise, cut heads and neurons out, inspect."""

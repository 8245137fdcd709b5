"""The contract every other part shares: patterns, masks, packed tensors and the checkpoint format.

Layer 0 of the project (torch, safetensors, numpy and the standard library; nothing else). The offline side
(`maskgen`) writes these types, the online side (`sparse_serve`) reads them, and neither needs the other. The format
itself is specified, with a worked example in bytes, in `proto/checkpoint.md`.

Reading order: `errors`, `pattern`, `mask`, `packed`, `config`, `checkpoint`, `writer`.
"""

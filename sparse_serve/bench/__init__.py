"""`sparse-serve bench`: how fast sparse is, against dense, on this machine."""

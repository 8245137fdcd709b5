"""The `sparse-serve` command.

`main` finds the verb's file; `request`, `settings`, `terminal` are shared by verbs, `vllm` is vLLM's own command.
"""

"""The `sparse-serve` command: `main` finds the verb, the other files are verbs."""

"""The `maskgen` command: its arguments, its verbs, and everything a person sees while they run."""

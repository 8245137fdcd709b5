"""Keeps what vLLM says of every step of its engine: when it was made, and how many tokens were read and written."""

from collections.abc import Callable
from typing import Any

from sparse_serve.engine import Progress


class StepLogger:
    """What vLLM calls a stat logger, one for each replica of the model."""

    def __init__(self, progress: Progress, vllm_config: Any = None, engine_index: int = 0) -> None:
        self._progress, self._replica = progress, engine_index
        progress.stepped(engine_index)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *more: Any, **others: Any) -> None:
        """A step has ended."""
        self._progress.stepped(self._replica)
        if iteration_stats is not None:
            self._progress.prompt_tokens += iteration_stats.num_prompt_tokens
            self._progress.generated_tokens += iteration_stats.num_generation_tokens

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Everything else that vLLM tells a stat logger is nothing to this one."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

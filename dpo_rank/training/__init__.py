"""Training a policy against a frozen reference, on `transformers.Trainer` through the scoring core."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_rank.training.config import DPOConfig
    from dpo_rank.training.policy import average_adapters
    from dpo_rank.training.run import train
    from dpo_rank.training.trainer import DPOTrainer

__all__ = ["DPOConfig", "DPOTrainer", "average_adapters", "train"]

_HOMES = {"DPOConfig": "config", "DPOTrainer": "trainer", "average_adapters": "policy", "train": "run"}


def __getattr__(name: str) -> Any:
    """Load torch and transformers when they are first used."""
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"dpo_rank.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

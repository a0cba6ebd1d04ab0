"""A tiny run in a process of its own: ``python -m tests.training.driver DIRECTORY '{"settings": ..., "resume": ..., "die_at": ...}'``.

Prints the SHA-256 of the final weights and optimizer state and the losses as JSON. ``die_at``: ``[point, count]`` kills the process with
SIGKILL when `dpo_rank.training.checkpoint.reached` hears of the point for the count-th time; ``fail_at`` raises an OSError there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from dpo_rank.data.synthetic import pairs
from dpo_rank.training import DPOConfig, DPOTrainer, checkpoint
from tests.artifacts import tiny_pair

ROWS = 22


def make(directory: Path, settings: dict[str, Any], name: str = "gpt2", rows: Any = None, **arguments: Any) -> DPOTrainer:
    """A trainer whose model, rows and order are the same in every process; gpt2 has dropout that a packed row can take."""
    policy, reference, tok = tiny_pair(name)
    for config in (policy.config, reference.config):
        config.resid_pdrop = 0.1
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    for block in getattr(getattr(policy, "transformer", None), "h", ()):
        block.attn.attn_dropout.p = 0.0
    usual = {
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = DPOConfig(str(directory), **{**usual, **settings})
    return DPOTrainer(
        policy, reference, args, train_dataset=rows or list(pairs(ROWS)), eval_dataset=list(pairs(4, seed=9)), processing_class=tok, **arguments
    )  # fmt: skip


def state_of(trainer: DPOTrainer) -> dict[str, Any]:
    """What two equal runs share to the last bit."""
    optimizer = trainer.optimizer.state_dict()["state"]
    tensors = [(f"{index}/{key}", value) for index, entry in optimizer.items() for key, value in entry.items()]
    history = [{k: v for k, v in entry.items() if "per_second" not in k and "runtime" not in k} for entry in trainer.state.log_history]
    return {
        "weights": checkpoint.weights_digest(trainer.policy.named_parameters()),
        "optimizer": checkpoint.weights_digest(
            iter([(name, value.reshape(-1)) for name, value in sorted(tensors, key=lambda pair: pair[0])])
        ),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "rates": [entry["learning_rate"] for entry in history if "learning_rate" in entry],
    }


def main() -> None:
    directory, request = Path(sys.argv[1]), json.loads(sys.argv[2])
    seen: dict[str, int] = {}

    def reached(point: str) -> None:
        seen[point] = seen.get(point, 0) + 1
        if request.get("die_at") == [point, seen[point]]:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.get("fail_at") == [point, seen[point]]:
            raise OSError(28, "No space left on device")

    checkpoint.reached = reached
    trainer = make(directory, request.get("settings", {}), rows=list(pairs(request.get("rows", ROWS))))
    resume = request.get("resume", False) and checkpoint.last_complete(directory) is not None
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        sys.stdout.write(json.dumps(state_of(trainer)) + "\n")


if __name__ == "__main__":
    main()

"""Checkpoints that are complete or absent, and hold nothing that is unpickled.

A checkpoint is written under a name of its own, every file is synced and listed by size and SHA-256 in ``checkpoint.json``, and the
directory is then renamed to ``checkpoint-<step>``. What a crash leaves behind never has that name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_rank.artifact import sha256, sync
from dpo_rank.errors import TrainingError

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
OPTIMIZER, RNG = "optimizer", "rng"
WRITE_POINTS = ("begun", "weights", "optimizer", "rng", "state", "manifest", "renamed", "rotated")
"""Places in `Trainer._save_checkpoint` and `writing` that `reached` names, in order."""

_PARTIAL = re.compile(r"\.checkpoint-\d+-partial")
_COMPLETE = re.compile(r"checkpoint-(\d+)")


def reached(point: str) -> None:
    """Called at each of `WRITE_POINTS`; tests of crashes put their own function here."""


@contextmanager
def writing(run: Path, step: int, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A directory to write a checkpoint into, which becomes ``checkpoint-<step>`` when the block ends.

    Args:
        run: the directory of the run's checkpoints.
        step: the optimizer step that it stands after.
        facts: what `require_same` compares when the run goes on.

    Raises:
        TrainingError: the disk is full or refuses; what was there before is untouched.

    """
    partial, final = run / f".checkpoint-{step}-partial", run / f"checkpoint-{step}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        for left in run.iterdir():
            if _PARTIAL.fullmatch(left.name):
                shutil.rmtree(left)
        partial.mkdir()
        reached("begun")
        yield partial
        files = {}
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                sync(file)
                files[file.relative_to(partial).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
        manifest = partial / MANIFEST
        manifest.write_text(json.dumps({"step": step, "facts": dict(facts), "files": files}, indent=1), encoding="utf-8")
        sync(manifest)
        for directory in [*(item for item in partial.rglob("*") if item.is_dir()), partial]:
            sync(directory)
        reached("manifest")
        if final.exists():  # of this step already, from before the run was taken up again
            shutil.rmtree(final)
        partial.rename(final)
        sync(run)
        reached("renamed")
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(f"checkpoint {step} could not be written to {run}: {error}. {_go_on(run)}") from error


def _go_on(run: Path) -> str:
    last = last_complete(run)
    return "There is no earlier checkpoint" if last is None else f"The run can go on from {last}: make room, then train with resume"


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by file; None where it is whole."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in listed.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"] or sha256(file) != entry["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def complete(run: Path) -> list[Path]:
    """Checkpoints that have a manifest, the newest last; their files are not read."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).is_file()]


def last_complete(run: Path) -> Path | None:
    """The newest checkpoint whose files are whole; damaged ones are named in a warning."""
    for path in reversed(complete(run)):
        if (what := problem(path)) is None:
            return path
        logger.warning("%s is passed over: %s", path, what)
    return None


def rotate(run: Path, keep: int | None, best: str | None) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one."""
    if keep is None or keep <= 0:
        return
    for old in complete(run)[:-keep]:
        if best is None or old.name != Path(best).name:
            shutil.rmtree(old)
    reached("rotated")


def require_same(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run.

    Raises:
        TrainingError: the message names the first field that differs.

    """
    stored = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["facts"]
    for name in sorted(stored.keys() | facts.keys()):
        if stored.get(name) != json.loads(json.dumps(facts.get(name))):
            raise TrainingError(
                f"{checkpoint} cannot be continued: {name} was {_short(stored.get(name))} and is {_short(facts.get(name))}. "
                "Use the run's own settings and data, or another output directory"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}..."


def weights_digest(parameters: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors in their order."""
    digest = hashlib.sha256()
    for name, value in parameters:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_optimizer(path: Path, optimizer: Any, scheduler: Any) -> None:
    """``optimizer.safetensors`` and ``optimizer.json``: an optimizer's state and its schedule's."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value.detach().contiguous()
            else:
                values.setdefault(str(index), {})[key] = value
    save_file(tensors, path / f"{OPTIMIZER}.safetensors")
    content = {"state": values, "param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (path / f"{OPTIMIZER}.json").write_text(json.dumps(content), encoding="utf-8")


def load_optimizer(path: Path, optimizer: Any, scheduler: Any) -> None:
    """Put back what `save_optimizer` wrote."""
    content = json.loads((path / f"{OPTIMIZER}.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in content["state"].items()}
    for name, value in load_file(path / f"{OPTIMIZER}.safetensors").items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})
    scheduler.load_state_dict(content["scheduler"])


def save_rng(path: Path, rank: int) -> None:
    """``rng-<rank>.json`` and ``.safetensors``: the state of every generator of random numbers in this process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # the state that libraries draw from
    version, words, own = random.getstate()
    content = {"python": [version, list(words), own], "numpy": [str(kind), np.asarray(keys).tolist(), position, has_gauss, gauss]}
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda/{n}": value for n, value in enumerate(torch.cuda.random.get_rng_state_all())}
    save_file(tensors, path / f"{RNG}-{rank}.safetensors")
    (path / f"{RNG}-{rank}.json").write_text(json.dumps(content), encoding="utf-8")


def load_rng(path: Path, rank: int) -> None:
    """Put back what `save_rng` wrote.

    Raises:
        TrainingError: the checkpoint was written by another number of processes.

    """
    file = path / f"{RNG}-{rank}.json"
    if not file.is_file():
        raise TrainingError(f"{path} has no random state for process {rank}: go on with as many processes as wrote it")
    content = json.loads(file.read_text(encoding="utf-8"))
    version, words, own = content["python"]
    random.setstate((version, tuple(words), own))
    kind, keys, *rest = content["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    tensors = load_file(path / f"{RNG}-{rank}.safetensors")
    torch.random.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        torch.cuda.random.set_rng_state_all([tensors[f"cuda/{n}"] for n in range(len(tensors) - 1)])


def load_weights(model: Any, path: Path) -> None:
    """Put the weights of a checkpoint into ``model``, a transformers or a peft model.

    Raises:
        TrainingError: they are another architecture's.

    """
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
        return
    state: dict[str, Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        state |= load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or any(name not in tied for name in missing):
        raise TrainingError(f"{path}: its weights do not fit {type(model).__name__}: {[*unexpected, *missing][0]}")

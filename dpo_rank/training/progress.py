"""What a run shows while it trains and leaves behind: a bar, curves, and what stops it."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

if TYPE_CHECKING:
    from dpo_rank.training.trainer import DPOTrainer

HISTORY, CURVES = "history.jsonl", "curves.png"
_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "eval_loss": "held-out loss",
    "eval_agreement": "held-out agreement",
    "eval_margin_length_correlation": "lean on length",
}


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """One bar on stderr with the newest figures; every log also goes to ``history.jsonl`` of the run."""

    def __init__(self, disable: bool | None) -> None:
        self.disable = disable
        self.bar: Any = None
        self.figures: dict[str, str] = {}
        self.history: list[dict[str, float]] = []
        self._since = (time.perf_counter(), 0.0)

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of its own for something that is counted."""
        with tqdm(total=total, desc=what, unit="row", dynamic_ncols=True, disable=self.disable) as bar:
            yield lambda count: bar.update(count) and None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=self.disable)
        self._since = (time.perf_counter(), 0.0)
        file = Path(args.output_dir or ".") / HISTORY
        if state.is_world_process_zero and file.is_file():  # of the steps that are not done again
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            self.history = [entry for entry in lines if entry["step"] <= state.global_step and state.global_step]
            file.write_text("".join(json.dumps(entry) + "\n" for entry in self.history), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = dict(logs or {})
        if "tokens" in logs:
            now, tokens = time.perf_counter(), logs.pop("tokens")
            logs["tokens_per_second"] = round((tokens - self._since[1]) / (now - self._since[0]), 1)
            self._since = (now, tokens)
            self.figures["tokens/s"] = f"{logs['tokens_per_second']:.0f}"
        self.figures |= {shown: f"{logs[key]:.3f}" for key, shown in _SHOWN.items() if key in logs}
        if self.bar is not None:
            self.bar.set_postfix(self.figures)
        if state.is_world_process_zero and args.output_dir:
            entry = {"step": state.global_step, **logs}
            self.history.append(entry)
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            with (Path(args.output_dir) / HISTORY).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and args.output_dir:
            plot(self.history, Path(args.output_dir) / CURVES)


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C finishes the step, writes a checkpoint and stops; the second interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def release(self) -> None:
        """Give Ctrl-C back to whom it belonged."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


class EvaluateLast(TrainerCallback):  # type: ignore[misc]
    """The last step is evaluated too, whatever the interval."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class Guard(TrainerCallback):  # type: ignore[misc]
    """Refuses an optimizer step whose gradient is not finite."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        rows, self.trainer.step_rows = self.trainer.step_rows, []
        if self.trainer.accelerator.scaler is not None:
            return  # with scaled losses an overflow is part of the method: the scaler skips the step
        gradients = [parameter.grad for parameter in self.trainer.model.parameters() if parameter.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.trainer.refuse_step("the gradient is not finite", rows)


def plot(history: Sequence[dict[str, float]], path: Path) -> bool:
    """Loss, rewards and agreement over the steps, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = [
        ("loss", {"loss": "training", "eval_loss": "held out"}),
        ("reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}),
        ("held-out agreement", {"eval_agreement": "agreement"}),
        ("lean on length", {"eval_margin_length_correlation": "correlation of margin and length"}),
    ]
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for key, label in lines.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, markersize=3, label=label)
        if key == "eval_agreement":
            band = [(e["step"], e["eval_agreement_low"], e["eval_agreement_high"]) for e in history if "eval_agreement_low" in e]
            if band:
                axis.fill_between(*zip(*band, strict=True), alpha=0.15, label="95 %")
            axis.axhline(0.5, color="0.7", linewidth=0.8)
            axis.set_ylim(0, 1)
        if key == "eval_margin_length_correlation":
            axis.axhline(0, color="0.7", linewidth=0.8)
            axis.set_ylim(-1, 1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    return True

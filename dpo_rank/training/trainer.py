"""The trainer: `transformers.Trainer` with packed rows, a frozen reference and held-out agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from dpo_rank.scoring.logps import TokenLogProbs
from dpo_rank.training.collate import TrainingGroup, collate, layout_of, per_candidate
from dpo_rank.training.config import DPOConfig
from dpo_rank.training.losses import LOSSES, labelled_pairs


class PreferenceTrainer(Trainer):  # type: ignore[misc]  # transformers ships no types here
    """Trains the policy so that its implicit reward orders candidates as the labels do.

    Args:
        policy: a transformers model; its attention implementation is set and its dropout switched off.
        reference: the frozen model, or None to train ``policy`` by language modelling on each group's best candidate.
        config: settings of the run.
        save_extra: writes what belongs beside a checkpoint's weights (the tokenizer).

    """

    def __init__(
        self,
        policy: Any,
        reference: Any | None,
        config: DPOConfig,
        *,
        train_groups: Sequence[TrainingGroup],
        eval_groups: Sequence[TrainingGroup],
        args: TrainingArguments,
        save_extra: Callable[[Path], None],
    ) -> None:
        switch_dropout_off(policy)
        self.config, self.save_extra = config, save_extra
        self.reference = None if reference is None else TokenLogProbs(reference).requires_grad_(False)
        self._reference_rewards: list[Tensor] = []
        model = TokenLogProbs(policy, borrow=False)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=cast("Any", train_groups),
            eval_dataset=cast("Any", eval_groups),
        )
        self.model_accepts_loss_kwargs = False
        for printing in (ProgressCallback, PrinterCallback):  # they write to stdout, which belongs to a command's result
            self.remove_callback(printing)
        self.add_callback(_Progress())
        if self.reference is not None:
            self.reference.to(self.args.device)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **_: Any) -> Any:
        """Mean loss of the batch's prompts (DPO), or of its tokens (language modelling)."""
        logps = model(layout_of(inputs))
        if self.reference is None:
            return -logps.mean()
        rewards = self._rewards(logps, self._reference_logps(inputs), inputs)
        losses = LOSSES[self.config.loss](rewards, inputs["mask"], inputs["targets"])
        chosen = rewards.gather(1, inputs["targets"].argmax(dim=1, keepdim=True))[:, 0]
        others = (rewards * inputs["mask"]).sum(dim=1) - chosen
        margin = chosen - others / (inputs["mask"].sum(dim=1) - 1).clamp(min=1)
        self._noted = {"margin": float(margin.detach().mean())}
        return losses.mean()

    def _reference_logps(self, inputs: dict[str, Tensor]) -> Tensor:
        assert self.reference is not None
        with torch.no_grad():
            return cast("Tensor", self.reference(layout_of(inputs)))

    def _rewards(self, policy: Tensor, reference: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.config.beta * per_candidate(policy - reference, inputs, self.config.reward == "mean")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, the mean reward margin of the last batch included."""
        if "loss" in logs:
            logs = {**logs, **getattr(self, "_noted", {})}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and, with a reference, the share of held-out pairs that the rewards order as their labels do (ties count half)."""
        groups = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        training, loss, agreement, count = model.training, 0.0, 0.0, 0
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for number, batch in enumerate(self._batches(groups)):
                logps, size = model(layout_of(batch)), len(batch["targets"])
                count += size
                if self.reference is None:
                    loss -= float(logps.mean()) * size
                    continue
                if number == len(self._reference_rewards):  # the reference is frozen: one pass serves every evaluation
                    self._reference_rewards.append(self._reference_logps(batch).cpu())
                rewards = self._rewards(logps, self._reference_rewards[number].to(logps.device), batch)
                loss += float(LOSSES[self.config.loss](rewards, batch["mask"], batch["targets"]).sum())
                agreement += float(_agreement(rewards, batch["mask"], batch["targets"]).sum())
        model.train(training)
        metrics = {f"{metric_key_prefix}_loss": loss / count}
        if self.reference is not None:
            metrics[f"{metric_key_prefix}_agreement"] = agreement / count
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _batches(self, groups: Sequence[TrainingGroup]) -> Iterator[dict[str, Tensor]]:
        size = self.config.batch_size  # prompts of like length stand together: their padded views waste less
        groups = sorted(groups, key=lambda item: (max(map(len, item.group.candidates)), len(item.group.prompt)))
        for start in range(0, len(groups), size):
            batch = collate(groups[start : start + size])
            yield {name: tensor.to(self.args.device) for name, tensor in batch.items()}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint holds the plain transformers model."""
        directory = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model).model
        own = None if state_dict is None else {k.removeprefix("model."): v for k, v in state_dict.items()}
        model.save_pretrained(directory, state_dict=own)
        self.save_extra(directory)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """One bar on stderr with the newest figures."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        shown = {"loss": "loss", "margin": "margin", "eval_loss": "held-out loss", "eval_agreement": "held-out agreement"}
        self.figures |= {shown[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in shown}
        if self.bar is not None:
            self.bar.set_postfix(self.figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def _agreement(rewards: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """``[B]``: for each prompt, the share of its labelled pairs in the right order; equal rewards count half."""
    better = labelled_pairs(mask, targets)
    difference = rewards[:, :, None] - rewards[:, None, :]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return (right * better).sum(dim=(1, 2)) / better.sum(dim=(1, 2)).clamp(min=1)


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Set every dropout rate to 0: policy and reference must differ by their weights alone."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name in ("attn_pdrop", "resid_pdrop")):
                setattr(module, name, 0.0)

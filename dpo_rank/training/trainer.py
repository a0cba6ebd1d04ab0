"""The trainer: `transformers.Trainer` with packed rows, a frozen reference, held-out agreement and checkpoints that can be relied on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from dpo_rank.data.formats import Example, Problems, read
from dpo_rank.errors import DataError, ModelError, TrainingError
from dpo_rank.scoring.derive import CannotExpressError, prompt_format
from dpo_rank.scoring.encode import Encoder, Limits
from dpo_rank.scoring.encode import load_tokenizer as tokenizer_of
from dpo_rank.scoring.logps import TokenLogProbs
from dpo_rank.scoring.pair import load_model, load_tokenizer, positions, tokenizer_json
from dpo_rank.scoring.prompt_format import PromptFormat
from dpo_rank.scoring.torch_engine import plain_models
from dpo_rank.training import checkpoint, policy, prepare
from dpo_rank.training.collate import Collator, Slice, layout_of, per_candidate
from dpo_rank.training.config import AUTO, DPOConfig
from dpo_rank.training.heldout import HeldOut, measure
from dpo_rank.training.losses import LOSSES, kto, labelled_pairs, nll_of_the_best
from dpo_rank.training.prepare import TrainingGroup
from dpo_rank.training.progress import EvaluateLast, Guard, ProgressBar, StopOnInterrupt
from dpo_rank.training.reference import with_reference

logger = logging.getLogger(__name__)

MAX_DEFAULT_TOKENS = 1024
SFT = "sft"
_MAY_DIFFER = frozenset(
    [
        *("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "resume_from_checkpoint", "overwrite_output_dir"),
        *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "metric_for_best_model"),
        *("greater_is_better", "export", "precisions", "keep_models", "on_error", "evals", "held_out", "per_device_eval_batch_size"),
        *("local_rank", "hub_token", "push_to_hub_token", "deepspeed_plugin", "dataloader_num_workers", "sft", "sft_epochs"),
        *("sft_learning_rate", "dataset_num_proc", "precompute_ref_batch_size", "log_level", "log_level_replica", "eval_on_start"),
    ]
)
"""Settings that may change when a run goes on: they change nothing that is trained."""


class DPOTrainer(Trainer):  # type: ignore[misc]  # transformers ships no types here
    """Trains a policy so that its implicit reward orders candidates as the labels do; takes TRL 1.16's arguments.

    Args:
        model: path, hub id, transformers model or peft model of the policy. A model's attention implementation is set, and its dropout
            switched off unless ``args`` says otherwise.
        ref_model: the frozen reference; by default a copy of the policy's start, or for an adapter its base with the adapter off.
        args: settings.
        data_collator: refused: rows are packed by the trainer's own.
        train_dataset: rows in any format that `dpo_rank.data.formats.read` knows, a ``datasets`` dataset or `Example` objects.
        eval_dataset: held-out rows, likewise.
        processing_class: the tokenizer; by default the model's.
        compute_metrics: refused: `evaluate` reports agreement, and `dpo_rank.evaluation` everything else.
        callbacks, optimizers: as for `transformers.Trainer`.
        quantization_config: for loading a model that is given by path or id.
        peft_config: train this adapter instead of the model's own weights.

    Attributes:
        encoder: how rows become token ids.
        form: the prompt format.
        policy, reference: the models.
        loss_name: the loss, found from the data where the settings leave it open.
        problems: bad rows that were skipped.

    Raises:
        DataError: rows that cannot be trained on, or an argument that is not taken.
        ModelError: a model that cannot be trained through the scoring core.

    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        for name, value in (("data_collator", data_collator), ("compute_metrics", compute_metrics)):
            if value is not None:
                raise DataError(f"{name} is not taken: see the documentation of DPOTrainer")
        args = DPOConfig("dpo-rank-run") if args is None else args
        if not isinstance(args, DPOConfig):
            raise DataError(f"args must be a dpo_rank.training.DPOConfig, not {type(args).__name__}")
        if train_dataset is None:
            raise DataError("train_dataset is needed")
        if args.n_gpu > 1:
            logger.warning("several GPUs are visible and one is used; start the command with torchrun to use them all")
            args._n_gpu = 1
        set_seed(args.seed)
        self.problems = Problems()
        rows = _rows(train_dataset, args, self.problems)
        self.loss_name = _loss_of(rows, str(args.loss_type))
        self._sft = self.loss_name == SFT
        self.kind, self._options, self.reward = (LOSSES["sigmoid"], {}, "sum") if self._sft else args.resolved(self.loss_name)
        if self.kind.function is kto and args.per_device_train_batch_size < 2:
            raise DataError(
                "kto estimates its reference point on the answers to other prompts of a batch: per_device_train_batch_size >= 2"
            )
        self.rows = prepare.trainable(rows, single=self.kind.single or self._sft, on_error=args.on_error, problems=self.problems)
        if not self.rows:
            raise DataError("nothing to train on: no row has labels that tell its candidates apart")

        tokenizer = processing_class or load_tokenizer(model if isinstance(model, (str, os.PathLike)) else model.config._name_or_path)
        loaded = _loaded(model, args, quantization_config)
        if peft_config is not None:
            loaded = policy.with_adapter(loaded, peft_config)
        self.policy, self._tokenizer = loaded, tokenizer
        is_adapter = hasattr(loaded, "peft_config")
        plain = loaded.get_base_model() if is_adapter else loaded
        if args.disable_dropout:
            switch_dropout_off(plain)
        if args.train_layers is not None:
            if is_adapter:
                raise DataError("train_layers and an adapter do not go together: give the adapter's layers_to_transform")
            policy.freeze_below(plain, args.train_layers)
        self.form = _format(tokenizer, self.rows, args)
        self.encoder = _encoder(tokenizer, self.form, plain, self.rows, args)
        self._frozen = None if self._sft else self._reference_model(ref_model, tokenizer, is_adapter, args)
        reference = None if self._frozen is None else TokenLogProbs(self._frozen)
        if args.gradient_checkpointing:
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for name in ("gradient_checkpointing", "activation_checkpointing"):  # transformers 4 and 5
                if hasattr(args, name):  # done: the trainer would ask a module for it that is no transformers model
                    setattr(args, name, False)
        self.train_groups = self._groups(self.rows)
        self.eval_rows = [] if eval_dataset is None else self._held_out_rows(eval_dataset, args)
        self.eval_groups = self._groups(self.eval_rows)
        self._facts = self._run_facts(plain, args)
        with args.accelerator_precision():
            super().__init__(
                model=TokenLogProbs(plain, borrow=False),
                args=args,
                data_collator=Collator(cast("int", args.token_budget), mismatched=self.kind.function is kto),
                train_dataset=cast("Any", self.train_groups),
                eval_dataset=cast("Any", self.eval_groups) if self.eval_rows else None,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's rows, accumulation and processes included
        for printing in (ProgressCallback, PrinterCallback):  # they write to stdout, which belongs to a command's result
            self.remove_callback(printing)
        self.bar, self.stop = ProgressBar(args.disable_tqdm), StopOnInterrupt()
        for callback in (EvaluateLast(), self.bar, self.stop, Guard(self)):
            self.add_callback(callback)
        self.reference = reference
        if reference is not None:
            reference.to(self.args.device)
            if args.precompute_ref_log_probs:
                self._precompute(reference)
        self._tokens, self._noted = 0, _Noted()
        self.step_rows: list[str] = []

    # -- the pair ----------------------------------------------------------------------------------------------------

    def _reference_model(self, given: Any, tokenizer: Any, is_adapter: bool, args: DPOConfig) -> Any:
        if given is None:
            return plain_models(self.policy, None)[1] if is_adapter else policy.frozen_copy(self.policy)
        reference = _loaded(given, args, None)
        if isinstance(given, (str, os.PathLike)):
            theirs = load_tokenizer(given)
            if theirs.get_vocab() != tokenizer.get_vocab():
                raise ModelError(f"the tokenizers of the policy and of the reference {given} differ: a pair shares its token ids")
        if reference.config.vocab_size != self.policy.config.vocab_size:
            raise ModelError(
                f"the policy has {self.policy.config.vocab_size} token ids and the reference {reference.config.vocab_size}: "
                "a pair shares its token ids"
            )
        return reference

    def _precompute(self, reference: TokenLogProbs) -> None:
        cache = Path(self.args.output_dir or ".")
        precision = f"bf16={self.args.bf16} fp16={self.args.fp16}"
        total = len(self.train_groups) + len(self.eval_groups)
        with self.accelerator.autocast(), self.accelerator.main_process_first(), self.bar.counting("reference", total) as told:
            for groups in (self.train_groups, self.eval_groups):
                groups[:] = with_reference(reference, groups, self.args.token_budget, cache, precision, told)
        self.reference = self._frozen = None

    # -- rows --------------------------------------------------------------------------------------------------------

    def _groups(self, rows: Sequence[Example]) -> list[TrainingGroup]:
        groups = [prepare.encode_row(self.encoder, row) for row in rows]
        return [prepare.best_only(item) for item in groups] if self._sft else groups

    def _held_out_rows(self, data: Any, args: DPOConfig) -> list[Example]:
        rows = _rows(data, args, self.problems)
        return prepare.trainable(rows, single=self.kind.single or self._sft, on_error=args.on_error, problems=self.problems)

    def describe(self) -> prepare.DataFacts:
        """What stands in the training rows, in tokens and labels."""
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps = (
            self.args.max_steps if self.args.max_steps > 0 else int(np.ceil(np.ceil(len(self.rows) / size) * self.args.num_train_epochs))
        )
        return prepare.describe(self.rows, self.train_groups, self.encoder, size, steps)

    def time_one_step(self) -> float:
        """Seconds of forward and backward of one batch in the middle; the gradient is thrown away."""
        size = self.args.per_device_train_batch_size
        middle = max(0, len(self.train_groups) // 2 - size)
        batch = self.data_collator(self.train_groups[middle : middle + size])
        self.current_gradient_accumulation_steps = 1
        start = time.perf_counter()
        self.training_step(self.model, batch, torch.tensor(batch["rows"]))
        seconds = time.perf_counter() - start
        self.model.zero_grad()
        self.step_rows = []
        return float(seconds * self.args.gradient_accumulation_steps)

    # -- a step ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor:
        """Rows of an optimizer step, over accumulated batches and processes."""
        rows = torch.tensor(sum(batch["rows"] for batch in batch_samples), device=device)
        return cast("Tensor", self.accelerator.gather(rows).sum())

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, a packed row at a time."""
        point = self._reference_point(model, inputs["mismatched"]) if "mismatched" in inputs else None
        slices = self._as_many_everywhere(inputs["slices"])
        total: Tensor | None = None
        for number, part in enumerate(slices):
            self.step_rows += part["where"]
            if point is not None:
                part["reference_point"] = point
            is_last = number == len(slices) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = super().training_step(model, part, num_items_in_batch)
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _as_many_everywhere(self, slices: list[Slice]) -> list[Slice]:
        """With sharded parameters every process must run as many forward passes: the last slice again, at no weight."""
        if not self.is_fsdp_enabled:
            return slices
        count = int(self.accelerator.gather(torch.tensor(len(slices), device=self.args.device)).max())
        idle = {**slices[-1], "weights": torch.zeros_like(slices[-1]["weights"]), "where": []}
        return slices + [idle] * (count - len(slices))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The part's share of the step's loss: the sum over its rows, divided by the step's rows."""
        losses, rewards = self._losses(model, inputs)
        if not torch.isfinite(losses).all():
            broken = [where for where, loss in zip(inputs["where"], losses.tolist(), strict=True) if not np.isfinite(loss)]
            self.refuse_step("the loss is not finite", broken)
        if rewards is not None:
            self._noted.add(rewards.detach(), inputs, losses.detach())
        self._tokens += len(inputs["layout_input_ids"])
        rows = len(losses) if num_items_in_batch is None else num_items_in_batch
        loss = (losses * inputs["weights"]).sum() / rows
        # gradients are averaged over processes; the rows were counted over all of them
        return loss * (self.accelerator.num_processes if num_items_in_batch is not None else 1)

    def _losses(self, model: Any, part: Slice) -> tuple[Tensor, Tensor | None]:
        """``[B]`` and, where there is a reference, the rewards ``[B, N]``."""
        sums = per_candidate(model(layout_of(part)), part)
        if self._sft:
            return nll_of_the_best(sums, part["lengths"], part["mask"], part["targets"]), None
        rewards = self._rewards(sums, part)
        options = dict(self._options)
        if "reference_point" in part:
            options["reference_point"] = part["reference_point"]
        shaped = rewards + self.args.length_alpha * part["lengths"] if self.args.length_alpha else rewards
        losses = self.kind.function(shaped, part["mask"], part["targets"], **options)
        if self.args.rpo_alpha:
            losses = losses + self.args.rpo_alpha * nll_of_the_best(sums, part["lengths"], part["mask"], part["targets"])
        return losses, rewards

    def _rewards(self, policy_sums: Tensor, part: Slice) -> Tensor:
        if "reference" in part:
            reference = part["reference"]
        else:
            assert self.reference is not None
            with torch.no_grad(), self.accelerator.autocast():
                reference = per_candidate(self.reference(layout_of(part)), part)
        ratios = policy_sums - reference
        if self.reward == "mean":
            ratios = ratios / part["lengths"].clamp(min=1)
        return cast("Tensor", (self.args.beta * ratios).float())

    def _reference_point(self, model: Any, slices: list[Slice]) -> Tensor:
        """KTO's estimate of ``beta`` times the divergence: the mean reward of answers to other prompts, at least 0."""
        total, count = torch.zeros((), device=self.args.device), torch.zeros((), device=self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            for given in slices:
                part = self._prepare_inputs(given)
                rewards = self._rewards(per_candidate(model(layout_of(part)), part), part)
                total += rewards.sum()
                count += len(rewards)
        both = cast("Tensor", self.accelerator.gather(torch.stack([total, count])[None])).sum(dim=0)
        return (both[0] / both[1]).clamp(min=0)

    def refuse_step(self, what: str, rows: Sequence[str]) -> None:
        """Stop before the optimizer changes anything.

        Raises:
            TrainingError: always; it names step, rows and the last good checkpoint.

        """
        last = checkpoint.last_complete(Path(self.args.output_dir or "."))
        shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        raise TrainingError(
            f"step {self.state.global_step + 1}: {what} (rows: {shown}). The weights are those of step {self.state.global_step}; "
            + (f"the last checkpoint is {last}" if last else "no checkpoint was written yet")
            + ". A lower learning rate, max_grad_norm or fp32 may help; so may a look at the rows"
        )

    # -- what is reported --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, the rewards since the last log included; the names are TRL's."""
        if "loss" in logs:
            logs = {**logs, **self._noted.drain(), "tokens": self._tokens}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss on held-out rows and, with a reference, what `HeldOut` holds: agreement with its interval, rewards, the lean on length."""
        groups = self.eval_groups if eval_dataset is None else self._groups(self._held_out_rows(eval_dataset, self.args))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measure(self.held_out(groups)).items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out(self, groups: Sequence[TrainingGroup]) -> HeldOut:
        """Losses and rewards of rows that are not trained on."""
        model = self.accelerator.unwrap_model(self.model)
        training, found = model.training, HeldOut()
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for given in self.data_collator.slices(groups):
                part = self._prepare_inputs(given)
                if self.data_collator.mismatched:
                    part["reference_point"] = 0.0
                found.add(*self._losses(model, part), part)
        model.train(training)
        return found

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _run_facts(self, plain: Any, args: DPOConfig) -> dict[str, Any]:
        """What must not change when a run goes on."""
        settings = {name: value for name, value in args.to_dict().items() if name not in _MAY_DIFFER and _is_plain(value)}
        base = checkpoint.weights_digest(plain.named_parameters())
        reference = None if self._frozen is None else checkpoint.weights_digest(self._frozen.named_parameters())
        data = prepare.fingerprint(self.train_groups)
        return {**settings, "data": data, "base": base, "reference": reference, "loss": self.loss_name, "processes": args.world_size}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint``: True goes on from the last complete checkpoint of the output directory.

        Raises:
            TrainingError: there is none, it is damaged, or it belongs to a run with other settings, data or base.

        """
        found: str | None = None
        if resume_from_checkpoint:
            run = Path(self.args.output_dir or ".")
            path = checkpoint.last_complete(run) if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            if path is None:
                raise TrainingError(f"{run} holds no complete checkpoint to go on from")
            if resume_from_checkpoint is not True and (what := checkpoint.problem(path)) is not None:  # the last one was read already
                raise TrainingError(f"{path} cannot be continued: {what}")
            checkpoint.require_same(path, self._facts)
            found = str(path)
        try:
            result = super().train(found, *args, **kwargs)
        finally:
            self.stop.release()
            self.bar.close()
        if self.stop.asked:
            logger.warning("stopped after step %d; train(resume_from_checkpoint=True) goes on from there", self.state.global_step)
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        run, step = Path(self.args.output_dir or "."), self.state.global_step
        if best := self.state.best_global_step:
            at_best = run / f"checkpoint-{best}"
            if best == step or at_best.is_dir():
                self.state.best_model_checkpoint = str(at_best)
        partial = run / f".checkpoint-{step}-partial"
        with checkpoint.writing(run, step, self._facts) if self.args.should_save else contextlib.nullcontext(partial) as directory:
            self.accelerator.wait_for_everyone()
            self.save_model(str(directory), _internal_call=True)
            checkpoint.reached("weights")
            self._save_optimizer_and_scheduler(str(directory))
            self._save_scaler(str(directory))
            checkpoint.reached("optimizer")
            self._save_rng_state(str(directory))
            checkpoint.reached("rng")
            if self.args.should_save:
                self.state.stateful_callbacks["TrainerControl"] = self.control.state()
                self.state.save_to_json(str(Path(directory) / TRAINER_STATE_NAME))
            checkpoint.reached("state")
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint holds the plain transformers model, or its adapter, and the tokenizer."""
        directory = Path(output_dir or self.args.output_dir or ".")
        own = None if state_dict is None else {name.removeprefix("model."): value for name, value in state_dict.items()}
        self.policy.save_pretrained(directory, state_dict=own)
        self._tokenizer.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_weights(self.policy, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        checkpoint.load_weights(self.policy, Path(str(self.state.best_model_checkpoint)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.info("sharded optimizer state goes through torch's distributed checkpoint")
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            checkpoint.save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint_path)
        else:
            checkpoint.load_optimizer(Path(checkpoint_path), self.optimizer, self.lr_scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        if (scaler := self.accelerator.scaler) is not None and self.args.should_save:
            (Path(output_dir) / "scaler.json").write_text(json.dumps(scaler.state_dict()), encoding="utf-8")

    def _load_scaler(self, checkpoint_path: str | None) -> None:
        scaler, file = self.accelerator.scaler, Path(checkpoint_path or "") / "scaler.json"
        if scaler is not None and file.is_file():
            scaler.load_state_dict(json.loads(file.read_text(encoding="utf-8")))

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.save_rng(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_rng(Path(checkpoint_path), self.args.process_index)


class _Noted:
    """Rewards of the rows since the last log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.rows = 0

    def add(self, rewards: Tensor, part: Slice, losses: Tensor) -> None:
        mask, targets = part["mask"], part["targets"]
        better = labelled_pairs(mask, targets)
        labelled = better.any(dim=2).any(dim=1)
        if not bool(labelled.any()):
            return
        margins = rewards[:, :, None] - rewards[:, None, :]
        pairs = better.sum(dim=(1, 2)).clamp(min=1)
        chosen, rejected = better.any(dim=2), better.any(dim=1)
        per_row = {
            "rewards/chosen": (rewards * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1),
            "rewards/rejected": (rewards * rejected).sum(dim=1) / rejected.sum(dim=1).clamp(min=1),
            "rewards/accuracies": ((margins > 0) & better).sum(dim=(1, 2)) / pairs,
            "rewards/margins": torch.where(better, margins, 0.0).sum(dim=(1, 2)) / pairs,
        }
        for name, values in per_row.items():
            self.sums[name] = self.sums.get(name, 0.0) + float((values * labelled).sum())
        self.rows += int(labelled.sum())

    def drain(self) -> dict[str, float]:
        means = {name: value / self.rows for name, value in self.sums.items()} if self.rows else {}
        self.sums, self.rows = {}, 0
        return means


def _rows(data: Any, args: DPOConfig, problems: Problems) -> list[Example]:
    if isinstance(data, Sequence) and not isinstance(data, str) and all(isinstance(row, Example) for row in data):
        return list(data)
    return list(read(data, on_error=args.on_error, problems=problems))


def _loss_of(rows: Sequence[Example], name: str) -> str:
    """The loss asked for, or the usual one of the data."""
    if name != AUTO:
        return name
    widest = max((len(row.candidates) for row in rows), default=2)
    return "pointwise" if widest == 1 else "sigmoid"


def _loaded(model: Any, args: DPOConfig, quantization_config: Any) -> Any:
    if not isinstance(model, (str, os.PathLike)):
        return model
    options: dict[str, Any] = dict(cast("dict[str, Any]", args.model_init_kwargs or {}))
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return load_model(os.fspath(model), torch.device("cpu"), options.pop("dtype", torch.float32), **options)


def _format(tokenizer: Any, rows: Sequence[Example], args: DPOConfig) -> PromptFormat:
    try:
        return prepare.with_answer_lead(prompt_format(tokenizer, args.string_prompt), rows)
    except CannotExpressError as error:
        raise ModelError(f"the tokenizer's chat template cannot be stored in a ranker: {error}") from None


def _encoder(tokenizer: Any, form: PromptFormat, model: Any, rows: Sequence[Example], args: DPOConfig) -> Encoder:
    own = Limits.of_positions(positions(model.config))
    limits = Limits(
        args.max_prompt_tokens or min(own.max_prompt_tokens, MAX_DEFAULT_TOKENS),
        args.max_completion_tokens or min(own.max_completion_tokens, MAX_DEFAULT_TOKENS),
    )
    if limits.max_prompt_tokens + limits.max_completion_tokens > positions(model.config):
        raise DataError(f"max_prompt_tokens + max_completion_tokens exceed the model's {positions(model.config)} positions")
    passages = prepare.passage_format(rows, args.passage_format)
    return Encoder(tokenizer_of(tokenizer_json(tokenizer)), form, limits, passages, args.boundary)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Set every dropout rate to 0: policy and reference must differ by their weights alone."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name in ("attn_pdrop", "resid_pdrop")):
                setattr(module, name, 0.0)

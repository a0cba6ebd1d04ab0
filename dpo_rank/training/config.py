"""What a training run can be told: `transformers.TrainingArguments`, TRL's names for DPO, and ours."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from dpo_rank.data.formats import OnError
from dpo_rank.errors import DataError
from dpo_rank.scoring.encode import Boundary
from dpo_rank.scoring.engine import RewardForm
from dpo_rank.scoring.prompt_format import PassageFormat, StringPrompt
from dpo_rank.training.losses import LOSSES, LossKind, check_options

AUTO = "auto"
MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"


def _put_back(before: str | None) -> None:
    if before is None:
        os.environ.pop(MIXED_PRECISION, None)
    else:
        os.environ[MIXED_PRECISION] = before


@dataclass
class DPOConfig(TrainingArguments):  # type: ignore[misc]  # transformers ships no types here
    """Settings of a run: TRL 1.16's names in TRL's order, then ours; everything of `TrainingArguments` works too.

    Defaults that differ from TRL's: ``learning_rate`` 5e-5 (TRL: 1e-6), ``warmup_steps`` a tenth (0), ``lr_scheduler_type`` cosine
    (linear), ``bf16`` and ``gradient_checkpointing`` off (on), ``max_length`` None: no answer is cut silently (1024),
    ``loss_type`` by the data (sigmoid), ``save_total_limit`` 2: the best and the last checkpoint (all).

    Attributes:
        model_init_kwargs: for loading a model given by path or id.
        disable_dropout: policy and reference differ by their weights alone.
        max_length: must stay None; see ``max_prompt_tokens`` and ``max_completion_tokens``.
        precompute_ref_log_probs: score the training rows under the reference once, before training, and keep the sums in a cache
            beside the run; the reference is not held while the policy trains.
        loss_type: a name in `dpo_rank.training.losses.LOSSES`, ``"sft"`` (language modelling on the best answers), or ``"auto"``:
            pointwise for single answers, else sigmoid: the mean over a row's pairs (docs/results.md compares the losses).
        label_smoothing: share of turned labels, for sigmoid, robust and softmax.
        beta: strength of the reference (Rafailov et al. 2023, equation 4); for IPO its tau.
        reward: ``"sum"`` or ``"mean"`` of a candidate's log-ratios; None: what the loss prescribes, else the sum.
        loss_temperature: of softmax and listnet, in nats.
        target_temperature: of listnet: the difference of scores that makes an answer e times as likely to be the best.
        score_margin: of sigmoid: the margin that a difference of 1 between two scores asks for.
        soft_labels: scores are shares of annotators (sigmoid, softmax) or probabilities (pointwise).
        length_alpha: R-DPO (Park et al. 2024, arXiv 2403.19159, equation 9): reward per token that training credits to a candidate's
            length, so that the policy need not learn it; ranking does without.
        rpo_alpha: RPO (Pang et al. 2024, arXiv 2404.19733, equation 1): weight of language modelling on a row's best answer, in nats a
            token, beside the loss; it keeps the log-probs of whole answers from falling with those of the worse ones.
        desirable_weight, undesirable_weight: of KTO.
        train_layers: only the top so many layers, the final norm and an untied head are trained; the pair then shares its lower layers.
        token_budget: tokens of one packed row; a step's rows are cut into as many packed rows as that takes. None: 1,024 on a CPU, where
            larger rows are no faster and take more memory, and 8,192 on a GPU.
        max_prompt_tokens, max_completion_tokens: longer prompts lose their left, longer answers their tail, and both are counted.
            None: half of the model's positions each, 1,024 at most.
        boundary, string_prompt, passage_format: how rows become tokens; stored in the artifact.
        on_error: what to do with a bad row.
        held_out: share of prompts kept out of training where no evaluation data is given.
        evals: how often in a run the held-out rows are scored and a checkpoint is written.
        sft: first train on the best answers by plain language modelling; the result is both reference and start.
        sft_epochs, sft_learning_rate: of that stage.
        export, precisions, keep_models: what the artifact at the end holds.

    """

    learning_rate: float = 5e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    num_train_epochs: float = 1.0
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool | None = False
    dataloader_pin_memory: bool = False
    logging_nan_inf_filter: bool = False

    # TRL 1.16, in its order
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    disable_dropout: bool = True
    dataset_num_proc: int | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    padding_free: bool = False
    pad_to_multiple_of: int | str | None = "auto"
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    loss_type: list[str] | str = AUTO
    loss_weights: list[float] | None = None
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    label_smoothing: float = 0.0
    beta: float = 0.1
    use_weighting: bool = False
    discopop_tau: float = 0.05
    activation_offloading: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    pad_token: str | None = None

    # ours
    reward: RewardForm | None = None
    loss_temperature: float = 1.0
    target_temperature: float = 1.0
    score_margin: float = 0.0
    soft_labels: bool = False
    length_alpha: float = 0.0
    rpo_alpha: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    train_layers: int | None = None
    token_budget: int | None = None
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    boundary: Boundary = "split"
    string_prompt: StringPrompt | None = None
    passage_format: PassageFormat | None = None
    on_error: OnError = "raise"
    held_out: float = 0.05
    evals: int = 4
    sft: bool = False
    sft_epochs: float = 1.0
    sft_learning_rate: float = 2e-4
    export: bool = True
    precisions: Sequence[str] = field(default_factory=lambda: ("fp32", "int8"))
    keep_models: bool = True

    LACKING: ClassVar[dict[str, str]] = {
        "trust_remote_code": "code from a model repository is never run",
        "max_length": "it would cut answers silently; max_prompt_tokens and max_completion_tokens cut and count",
        "truncation_mode": "prompts lose their left and answers their tail, and both are counted",
        "router_aux_loss_coef": "there is no loss for balancing experts",
        "padding_free": "rows are always read without padding",
        "loss_weights": "a run has one loss; rpo_alpha adds language modelling on the best answer",
        "ld_alpha": "not here; length_alpha (R-DPO) and reward='mean' hold length back",
        "f_divergence_type": "the implicit reward that ranks is that of the reverse KL divergence",
        "f_alpha_divergence_coef": "the implicit reward that ranks is that of the reverse KL divergence",
        "use_weighting": "rows may have a 'weight' of their own",
        "discopop_tau": "that loss is not here",
        "activation_offloading": "gradient_checkpointing saves memory",
        "sync_ref_model": "a ranker needs the reference that its policy was trained against",
        "ref_model_mixup_alpha": "a ranker needs the reference that its policy was trained against",
        "ref_model_sync_steps": "a ranker needs the reference that its policy was trained against",
        "pad_token": "nothing is padded",
    }
    """TRL's options that are refused when they are set, with what to do instead."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name, reason in self.LACKING.items():
            if getattr(self, name) != defaults[name]:
                raise DataError(f"{name}={getattr(self, name)!r} is refused: {reason}")
        if isinstance(self.loss_type, (list, tuple)):
            if len(self.loss_type) != 1:
                raise DataError(f"loss_type names {len(self.loss_type)} losses; a run has one")
            [self.loss_type] = self.loss_type
        self.precisions = tuple(self.precisions)
        above_zero = (
            "beta",
            "learning_rate",
            "num_train_epochs",
            "per_device_train_batch_size",
            "sft_epochs",
            "sft_learning_rate",
            "evals",
        )
        if self.token_budget is None:
            self.token_budget = 8192 if torch.cuda.is_available() and not getattr(self, "use_cpu", False) else 1024
        for name in (*above_zero, "loss_temperature", "token_budget"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.rpo_alpha < 0:
            raise DataError(f"rpo_alpha is a weight, 0 or above, not {self.rpo_alpha}")
        if not 0 < self.held_out < 1:
            raise DataError(f"held_out is a share between 0 and 1, not {self.held_out}")
        if self.reward not in (None, "sum", "mean"):
            raise DataError(f"reward is 'sum' or 'mean', not {self.reward!r}")
        if self.loss_type not in (AUTO, "sft"):
            self.resolved(str(self.loss_type))
        if self.warmup_steps >= 1:
            self.warmup_steps = int(self.warmup_steps)
        elif self.warmup_steps and hasattr(self, "warmup_ratio"):  # transformers 4 has two settings for it
            self.warmup_ratio, self.warmup_steps = self.warmup_steps, 0
        if not torch.accelerator.is_available():
            self.use_cpu = True
        before = os.environ.get(MIXED_PRECISION)
        super().__post_init__()
        _put_back(before)

    @contextlib.contextmanager
    def accelerator_precision(self) -> Iterator[None]:
        """transformers 4 tells accelerate of bf16 and fp16 in the environment, and leaves it there: the next run in the same process would
        train in a precision that nobody asked for. Here the setting lasts as long as an accelerator is made.
        """  # noqa: D403
        before = os.environ.get(MIXED_PRECISION)
        if self.bf16 or self.fp16:
            os.environ[MIXED_PRECISION] = "bf16" if self.bf16 else "fp16"
        try:
            yield
        finally:
            _put_back(before)

    def resolved(self, name: str) -> tuple[LossKind, dict[str, Any], RewardForm]:
        """The loss of this name with the options that were set for it, and the form of its rewards.

        Raises:
            DataError: it does not take one of them.

        """
        given: dict[str, tuple[str, Any, Any]] = {  # our name: the loss's name, the value, the default
            "label_smoothing": ("label_smoothing", self.label_smoothing, 0.0),
            "loss_temperature": ("temperature", self.loss_temperature, 1.0),
            "target_temperature": ("target_temperature", self.target_temperature, 1.0),
            "score_margin": ("margin", self.score_margin, 0.0),
            "soft_labels": ("soft", self.soft_labels, False),
            "desirable_weight": ("desirable_weight", self.desirable_weight, 1.0),
            "undesirable_weight": ("undesirable_weight", self.undesirable_weight, 1.0),
        }
        options = {theirs: value for theirs, value, default in given.values() if value != default}
        check_options(name, options)
        kind = LOSSES[name]
        if self.rpo_alpha and kind.single:
            raise DataError(f"rpo_alpha needs rows with a better and a worse answer; loss {name!r} reads single ones")
        if "beta" in kind.options():
            options["beta"] = self.beta
        if self.reward and kind.reward and self.reward != kind.reward:
            raise DataError(f"loss {name!r} compares the {kind.reward} of the log-ratios; reward={self.reward!r} does not go with it")
        return kind, options, kind.reward or self.reward or "sum"

    def run_directory(self, output: Path) -> Path:
        """Where checkpoints and logs of a run that writes ``output`` lie."""
        return output.with_name(output.name + ".run")

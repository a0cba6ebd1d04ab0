"""What a training run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo_rank.data.formats import OnError
from dpo_rank.errors import DataError
from dpo_rank.scoring.encode import Boundary
from dpo_rank.scoring.engine import RewardForm
from dpo_rank.scoring.prompt_format import PassageFormat, StringPrompt
from dpo_rank.training.losses import LOSSES, LossName


@dataclass(frozen=True)
class DPOConfig:
    """Settings of a run; the defaults train a small model on some thousand pairs.

    Attributes:
        beta: strength of the reference (Rafailov et al. 2023, equation 4).
        loss: name in `dpo_rank.training.losses.LOSSES`.
        reward: ``"sum"`` or ``"mean"`` of a candidate's log-ratios.
        learning_rate, epochs, warmup_ratio, weight_decay: of the DPO stage.
        batch_size: prompts a step.
        sft: first train on the best answers by plain language modelling; the result is both reference and start.
        sft_epochs, sft_learning_rate: of that stage.
        max_prompt_tokens, max_completion_tokens: longer prompts lose their left, longer answers their tail. None: half of
            the model's positions each, 1,024 at most.
        evals: how often the held-out agreement is measured.
        held_out: share of prompts kept out of training where no evaluation data is given.
        seed: of everything random.
        bf16: mixed precision.
        boundary, string_prompt, passage_format: how rows become tokens; stored in the artifact.
        on_error: what to do with a bad row.
        export: write the ONNX artifact at the end.
        precisions: the ONNX precisions to write, the default one first.
        keep_models: put policy and reference weights into the artifact, for the torch engine and further training.
        trust_remote_code: known from TRL; code from a model repository is never run, so True is refused.

    """

    beta: float = 0.1
    loss: LossName = "sigmoid"
    reward: RewardForm = "sum"
    learning_rate: float = 5e-5
    epochs: float = 1.0
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    batch_size: int = 8
    sft: bool = False
    sft_epochs: float = 1.0
    sft_learning_rate: float = 2e-4
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    evals: int = 4
    held_out: float = 0.05
    seed: int = 0
    bf16: bool = False
    boundary: Boundary = "split"
    string_prompt: StringPrompt | None = None
    passage_format: PassageFormat | None = None
    on_error: OnError = "raise"
    export: bool = True
    precisions: tuple[str, ...] = ("fp32", "int8")
    keep_models: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            raise DataError("trust_remote_code=True is refused: code from a model repository is never run")
        if self.loss not in LOSSES:
            raise DataError(f"loss {self.loss!r} is unknown; there are {', '.join(sorted(LOSSES))}")
        positive = ("beta", "learning_rate", "epochs", "batch_size", "sft_epochs", "sft_learning_rate", "evals")
        for name in positive:
            if not getattr(self, name) > 0:
                raise DataError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise DataError(f"held_out is a share between 0 and 1, not {self.held_out}")

    def run_directory(self, output: Path) -> Path:
        """Where checkpoints and logs of a run that writes ``output`` lie."""
        return output.with_name(output.name + ".run")

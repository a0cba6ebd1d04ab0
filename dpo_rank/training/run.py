"""A whole run: rows -> (language modelling ->) DPO -> the best checkpoint -> an artifact with a fitted temperature."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from dpo_rank import artifact as artifacts
from dpo_rank.artifact import Manifest
from dpo_rank.data.formats import Example, Problems, held_out, prompt_hash, read
from dpo_rank.errors import ArtifactError, DataError, ModelError, TrainingError
from dpo_rank.ranker import Ranker
from dpo_rank.scoring.encode import Encoder
from dpo_rank.scoring.pair import load_model, write_models
from dpo_rank.training import checkpoint, prepare
from dpo_rank.training.config import DPOConfig
from dpo_rank.training.prepare import DataFacts
from dpo_rank.training.progress import CURVES
from dpo_rank.training.trainer import SFT, DPOTrainer

logger = logging.getLogger(__name__)

BEST = "best.json"


@dataclass(frozen=True)
class TrainingResult:
    """What a run made.

    Attributes:
        output: the artifact.
        facts: what the artifact says of the run: rows, held-out agreement, temperature, ...
        problems: bad rows that were skipped.
        curves: a picture of the run, where matplotlib is installed.

    """

    output: Path
    facts: dict[str, Any]
    problems: Problems
    curves: Path | None = None


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        data: what it would train on.
        held_out_rows: what it would be measured on.
        loss: the loss.
        seconds_a_step: measured on one step.
        memory: bytes of weights, gradients, optimizer state and (measured) activations.
        problems: bad rows that would be skipped.

    """

    data: DataFacts
    held_out_rows: int
    loss: str
    seconds_a_step: float
    memory: dict[str, int]
    problems: Problems


def train(
    model: str,
    data: Any,
    output: str | Path,
    *,
    eval_data: Any = None,
    reference: str | None = None,
    config: DPOConfig | None = None,
    peft_config: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> TrainingResult:
    """Train a ranker on preferences.

    Args:
        model: path or hub id of the policy's start; ``"starter"``: the starter's base, from a checkout.
        data: rows, see `dpo_rank.data.formats.read`.
        output: the directory to make.
        eval_data: held-out rows; by default ``config.held_out`` of the prompts, by hash, never trained on.
        reference: path or id of the frozen reference; by default the start itself (after ``sft``).
        config: settings.
        peft_config: train this adapter; the artifact then holds one base and one adapter.
        resume: go on from the last complete checkpoint of the same run.
        overwrite: replace an existing output.
        say: told what is being done, in words.

    Raises:
        DataError: bad rows, or nothing to train on.
        ModelError: the model cannot be loaded, trained through the scoring core, or exported.
        TrainingError: the run was interrupted, broke, or cannot go on; the message says where it stands.

    """
    config = config or DPOConfig()
    output = Path(output)
    if not overwrite and output.exists():
        raise ArtifactError(f"{output} exists already: choose another place or pass overwrite")
    if reference is not None and config.sft:
        raise DataError("sft makes the reference itself: give either sft or a reference")
    run = config.run_directory(output)
    problems = Problems()
    kept, held = _rows(data, eval_data, config, problems)
    start = starter_base() if model == "starter" else model
    if config.sft:
        say("language modelling on the best answers")
        start = _stage(_settings(config, run / SFT, sft=True), start, None, kept, held, None, resume, say)[0]
    say(f"loading {model}")
    best, trainer = _stage(_settings(config, run / "dpo"), start, reference, kept, held, peft_config, resume, say)
    described = trainer.describe()
    facts: dict[str, Any] = {
        "base_model": model,
        "loss": trainer.loss_name,
        "rows": len(trainer.rows),
        "held_out_rows": len(trainer.eval_rows),
        "epochs": config.num_train_epochs,
        "learning_rate": config.learning_rate,
        "batch_size": described.rows_a_step,
        "seed": config.seed,
        "best_step": int(best.rpartition("-")[2]),
        "best_while_training": round(float(trainer.state.best_metric), 4),
        "boundary_differs": round(described.boundary_differs, 4),
        "rows_truncated": trainer.encoder.num_truncated,
    }
    frozen = load_model(reference or start, torch.device("cpu"), torch.float32)
    if peft_config is None:
        models: tuple[Any, Any] = (load_model(best, torch.device("cpu"), torch.float32), frozen)
    else:
        trainer._load_best_model()
        models = (trainer.policy.cpu(), None)
    manifest = Manifest(
        beta=config.beta,
        reward=trainer.reward,
        prompt_format=trainer.form,
        limits=trainer.encoder.limits,
        vocabulary=int(frozen.config.vocab_size),
        passage_format=trainer.encoder.passage_format,
        boundary=config.boundary,
        name=output.name,
        training=facts,
    )
    try:
        facts = finish(manifest, models, trainer.encoder, trainer.eval_rows, output, config, overwrite=overwrite, say=say)
    except ModelError as error:
        raise ModelError(
            f"{error}. The training is not lost: its policy is {best} (Ranker.from_models, dpo-rank export); "
            "`dpo-rank train --no-export` writes an artifact for the torch engine"
        ) from error
    shutil.rmtree(run / "artifact", ignore_errors=True)
    problems.messages += trainer.problems.messages
    curves = run / "dpo" / CURVES
    return TrainingResult(output, facts, problems, curves if curves.is_file() else None)


def dry_run(
    model: str, data: Any, *, eval_data: Any = None, reference: str | None = None, config: DPOConfig | None = None, peft_config: Any = None
) -> DryRun:
    """Read, encode and describe the rows of a run, and time one step of it; nothing is written.

    Raises:
        DataError, ModelError: as `train`.

    """
    config = config or DPOConfig()
    problems = Problems()
    kept, held = _rows(data, eval_data, config, problems)
    start = starter_base() if model == "starter" else model
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(start, reference, _settings(config, Path(scratch)), None, kept, held, peft_config=peft_config)
        before = _peak_memory()
        seconds = trainer.time_one_step()
    weights = sum(p.numel() * p.element_size() for p in trainer.policy.parameters())
    trained = sum(p.numel() * p.element_size() for p in trainer.policy.parameters() if p.requires_grad)
    memory = {
        "policy": weights,
        "reference": 0 if peft_config is not None or config.precompute_ref_log_probs else weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": max(0, _peak_memory() - before - trained),
    }
    problems.messages += trainer.problems.messages
    return DryRun(trainer.describe(), len(trainer.eval_rows), trainer.loss_name, seconds, memory, problems)


def _peak_memory() -> int:
    """Bytes: of the device where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _rows(data: Any, eval_data: Any, config: DPOConfig, problems: Problems) -> tuple[list[Example], list[Example]]:
    """Rows to train on and rows held out."""
    rows = list(read(data, on_error=config.on_error, problems=problems))
    if eval_data is None:
        kept, held = split(rows, config.held_out)
    else:
        kept, held = rows, list(read(eval_data, on_error=config.on_error, problems=problems))
    if not kept or not held:
        raise DataError(f"{len(kept)} rows to train on and {len(held)} held out: both are needed")
    return kept, held


def _settings(config: DPOConfig, directory: Path, sft: bool = False) -> DPOConfig:
    """The settings of one stage, which evaluates and writes a checkpoint ``config.evals`` times."""
    args = copy.copy(config)
    args.output_dir = str(directory)
    if sft:
        args.loss_type, args.learning_rate, args.num_train_epochs = SFT, config.sft_learning_rate, config.sft_epochs
    args.eval_strategy, args.save_strategy = IntervalStrategy.STEPS, SaveStrategy.STEPS
    args.eval_steps = args.save_steps = min(1 / config.evals, 1 - 1e-9)  # a share of all steps
    return args


def _stage(
    args: DPOConfig,
    start: str,
    reference: str | None,
    kept: Sequence[Example],
    held: Sequence[Example],
    peft_config: Any,
    resume: bool,
    say: Callable[[str], None],
) -> tuple[str, DPOTrainer]:
    """Train one stage; returns the best checkpoint, by held-out agreement (language modelling and single answers: by loss)."""
    directory = Path(args.output_dir)
    paired = args.loss_type != SFT and any(row.pairs() for row in held)
    args.metric_for_best_model, args.greater_is_better = ("eval_agreement", True) if paired else ("eval_loss", False)
    trainer = DPOTrainer(start, reference, args, None, kept, held, peft_config=peft_config)
    if not trainer.eval_rows:
        raise DataError("no held-out row has labels that tell its candidates apart")
    facts = trainer.describe()
    say(
        f"{facts.rows} rows to train on ({facts.tokens} tokens), {len(trainer.eval_rows)} held out, loss {trainer.loss_name}; "
        f"joint tokenisation differs at the boundary of {facts.boundary_differs:.1%}"
    )
    done = directory / BEST
    if resume and done.is_file():
        found = json.loads(done.read_text(encoding="utf-8"))
        trainer.state.best_metric = found["metric"]
        checkpoint.require_same(Path(found["checkpoint"]), trainer._facts)
        return str(found["checkpoint"]), trainer
    if not resume and checkpoint.complete(directory):
        shutil.rmtree(directory)  # of an earlier run that was to be replaced
    trainer.train(resume_from_checkpoint=resume and checkpoint.last_complete(directory) is not None)
    if trainer.stop.asked:
        raise TrainingError(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the same command with --resume goes on"
        )
    best = trainer.state.best_model_checkpoint
    if best is None or trainer.state.best_metric is None:
        raise ModelError("no checkpoint was written: the held-out figure is not a number")
    done.write_text(json.dumps({"checkpoint": best, "metric": trainer.state.best_metric}), encoding="utf-8")
    return str(best), trainer


def finish(
    manifest: Manifest,
    models: tuple[Any, Any],
    encoder: Encoder,
    held: Sequence[Example],
    output: Path,
    config: DPOConfig,
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the artifact: graphs (if wanted), models, the temperature and the held-out figures measured with what is written.

    Returns:
        The training facts that the artifact holds.

    """
    # Training ends in an artifact that is measured as its users will run it, so it calls export and evaluation.
    from dpo_rank.evaluation.agreement import held_out_table, log_probs_of
    from dpo_rank.evaluation.calibration import fit
    from dpo_rank.export.card import model_card

    building = config.run_directory(output) / "artifact"
    if config.export:
        from dpo_rank.export.pair import export_pair

        sample = [prepare.encode_row(encoder, row).group for row in held[:200]]
        export_pair(
            models,
            encoder,
            manifest,
            building,
            precisions=config.precisions,
            keep_models=config.keep_models,
            sample=sample,
            overwrite=True,
            progress=say,
        )
    else:
        artifacts.save(building, manifest, lambda root: write_models(root, models, encoder), overwrite=True)
    say("fitting the temperature and measuring the held-out rows")
    ranker = Ranker.load(building, engine="onnx" if config.export else "torch")
    paired = [row for row in held if row.pairs()]
    final = ranker.manifest
    if paired:  # single answers say nothing about the order of several
        log_probs = log_probs_of(ranker, paired)
        final, _ = fit(final, paired, log_probs)
        scores = [np.array([ranker.reward(item) for item in items]) for items in log_probs]
        final = replace(final, training={**final.training, "held_out": held_out_table(paired, scores)})
    measured = dict(final.training)

    def write(root: Path) -> None:
        artifacts.load(building).copy_files(root)
        (root / "README.md").write_text(model_card(final, final.precisions), encoding="utf-8")

    artifacts.save(output, final, write, overwrite=overwrite)
    return measured


def split(rows: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Rows to train on and rows held out, by a hash of the prompt; at least one prompt is held out."""
    held = [row for row in rows if held_out(row.prompt, share)]
    if not held and rows:
        first = min(prompt_hash(row.prompt) for row in rows)
        held = [row for row in rows if prompt_hash(row.prompt) == first]
    chosen = {id(row) for row in held}
    return [row for row in rows if id(row) not in chosen], held


def starter_base() -> str:
    """The starter's base model: in the working directory's or an editable install's checkout.

    Raises:
        ModelError: it is in neither; the message says how to make it.

    """
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if (root / "models" / "starter-base" / "config.json").is_file():
            return str(root / "models" / "starter-base")
    raise ModelError(
        "--model starter: the starter's base lies in the repository under models/starter-base, not in the wheel. Run from a "
        "checkout, rebuild it with `python examples/starter/base.py`, or give the path or hub id of another model"
    )

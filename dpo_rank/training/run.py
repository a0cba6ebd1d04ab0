"""A whole run: rows -> (language modelling ->) DPO -> the best checkpoint -> an artifact with a fitted temperature."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from dpo_rank import artifact as artifacts
from dpo_rank.artifact import Manifest
from dpo_rank.data.formats import Example, Problems, held_out, prompt_hash, read
from dpo_rank.errors import ArtifactError, DataError, ModelError
from dpo_rank.ranker import Ranker
from dpo_rank.scoring.derive import CannotExpressError, prompt_format
from dpo_rank.scoring.encode import Encoder, Limits
from dpo_rank.scoring.encode import load_tokenizer as tokenizer_of
from dpo_rank.scoring.pair import load_model, load_tokenizer, positions, tokenizer_json, write_models
from dpo_rank.scoring.prompt_format import PassageFormat, PromptFormat
from dpo_rank.training.collate import TrainingGroup
from dpo_rank.training.config import DPOConfig
from dpo_rank.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)

MAX_DEFAULT_TOKENS = 1024
_BOUNDARY_SAMPLE = 200


@dataclass(frozen=True)
class TrainingResult:
    """What a run made.

    Attributes:
        output: the artifact, or (without export) the directory of both models.
        facts: what the artifact says of the run: rows, held-out agreement, temperature, ...
        problems: bad rows that were skipped.

    """

    output: Path
    facts: dict[str, Any]
    problems: Problems


def train(
    model: str,
    data: Any,
    output: str | Path,
    *,
    eval_data: Any = None,
    reference: str | None = None,
    config: DPOConfig | None = None,
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
        overwrite: replace an existing output.
        say: told what is being done, in words.

    Raises:
        DataError: bad rows, or nothing to train on.
        ModelError: the model cannot be loaded, trained through the scoring core, or exported.

    """
    config = config or DPOConfig()
    output = Path(output)
    if not overwrite and output.exists():
        raise ArtifactError(f"{output} exists already: choose another place or pass overwrite")
    if reference is not None and config.sft:
        raise DataError("sft makes the reference itself: give either sft or a reference")
    run = config.run_directory(output)
    problems = Problems()
    rows = _labelled(data, config, problems)
    kept, held = (rows, _labelled(eval_data, config, problems)) if eval_data is not None else split(rows, config.held_out)
    if not kept or not held:
        raise DataError(f"{len(kept)} rows to train on and {len(held)} held out, with labels that differ: both are needed")

    set_seed(config.seed)
    path = starter_base() if model == "starter" else model
    say(f"loading {model}")
    tokenizer = load_tokenizer(path)
    policy = load_model(path, torch.device("cpu"), torch.float32)
    form = _format(tokenizer, kept, config)
    encoder = _encoder(tokenizer, form, policy, kept, config)
    train_groups, eval_groups = ([_group(encoder, row) for row in rows] for rows in (kept, held))
    sample = kept[:: max(1, len(kept) // _BOUNDARY_SAMPLE)]
    differing = sum(encoder.boundary_differs(row.prompt, row.candidates[0].text) for row in sample) / len(sample)
    say(f"{len(kept)} rows to train on, {len(held)} held out; joint tokenisation differs at the boundary of {differing:.1%}")

    def save_tokenizer(directory: Path) -> None:
        tokenizer.save_pretrained(directory)

    if config.sft:
        say("language modelling on the best answers")
        _fit(policy, None, config, run / "sft", train_groups, eval_groups, save_tokenizer)
    frozen = load_model(reference, torch.device("cpu"), torch.float32) if reference else _copy(policy)
    say("DPO")
    trainer = _fit(policy, frozen, config, run / "dpo", train_groups, eval_groups, save_tokenizer)
    best = trainer.state.best_model_checkpoint
    if best is None or trainer.state.best_metric is None:
        raise ModelError("no checkpoint was written: the held-out agreement is not a number")
    policy = load_model(best, torch.device("cpu"), torch.float32)
    facts: dict[str, Any] = {
        "base_model": model,
        "loss": config.loss,
        "rows": len(kept),
        "held_out_rows": len(held),
        "epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "best_step": int(best.rpartition("-")[2]),
        "best_held_out_agreement_while_training": round(float(trainer.state.best_metric), 4),
        "boundary_differs": round(differing, 4),
        "rows_truncated": encoder.num_truncated,
    }
    manifest = Manifest(
        beta=config.beta,
        reward=config.reward,
        prompt_format=form,
        limits=encoder.limits,
        vocabulary=int(policy.config.vocab_size),
        passage_format=encoder.passage_format,
        boundary=config.boundary,
        name=output.name,
        training=facts,
    )
    del trainer
    try:
        facts = finish(manifest, (policy, frozen.cpu()), encoder, held, output, config, overwrite=overwrite, say=say)
    except ModelError as error:
        raise ModelError(
            f"{error}. The training is not lost: its policy is {best} (Ranker.from_models, dpo-rank export); "
            "`dpo-rank train --no-export` writes an artifact for the torch engine"
        ) from error
    shutil.rmtree(run / "artifact", ignore_errors=True)
    return TrainingResult(output, facts, problems)


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
    from dpo_rank.evaluation.agreement import held_out_table, score_examples
    from dpo_rank.evaluation.calibration import calibrate
    from dpo_rank.export.card import model_card

    building = config.run_directory(output) / "artifact"
    if config.export:
        from dpo_rank.export.pair import export_pair

        sample = [_group(encoder, row).group for row in held[:200]]
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
    scores = score_examples(ranker, held)
    measured = {**ranker.manifest.training, "held_out": held_out_table(held, scores)}
    final = replace(ranker.manifest, temperature=calibrate(held, scores).temperature, calibrated=True, training=measured)

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


def _labelled(data: Any, config: DPOConfig, problems: Problems) -> list[Example]:
    """The rows whose labels tell candidates apart."""
    return [row for row in read(data, on_error=config.on_error, problems=problems) if row.pairs()]


def _format(tokenizer: Any, rows: Sequence[Example], config: DPOConfig) -> PromptFormat:
    try:
        form = prompt_format(tokenizer, config.string_prompt)
    except CannotExpressError as error:
        raise ModelError(f"the tokenizer's chat template cannot be stored in a ranker: {error}") from None
    if form.chat:
        return form
    texts = [candidate.text for row in rows for candidate in row.candidates]
    spaced = sum(text.startswith(" ") for text in texts) >= 0.95 * len(texts)
    return replace(form, answer_lead=" ") if spaced else form


def _encoder(tokenizer: Any, form: PromptFormat, model: Any, rows: Sequence[Example], config: DPOConfig) -> Encoder:
    own = Limits.of_positions(positions(model.config))
    limits = Limits(
        config.max_prompt_tokens or min(own.max_prompt_tokens, MAX_DEFAULT_TOKENS),
        config.max_completion_tokens or min(own.max_completion_tokens, MAX_DEFAULT_TOKENS),
    )
    if limits.max_prompt_tokens + limits.max_completion_tokens > positions(model.config):
        raise DataError(f"max_prompt_tokens + max_completion_tokens exceed the model's {positions(model.config)} positions")
    with_passages = any(row.passages for row in rows)
    passage_format = config.passage_format or (PassageFormat() if with_passages else None)
    return Encoder(tokenizer_of(tokenizer_json(tokenizer)), form, limits, passage_format, config.boundary)


def _group(encoder: Encoder, row: Example) -> TrainingGroup:
    try:
        encoded = encoder.encode(row.prompt, [c.text for c in row.candidates], [c.finished for c in row.candidates], row.passages or None)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None
    assert row.scores is not None
    return TrainingGroup(encoded.group, row.scores)


def _fit(
    policy: Any,
    reference: Any | None,
    config: DPOConfig,
    directory: Path,
    train_groups: Sequence[TrainingGroup],
    eval_groups: Sequence[TrainingGroup],
    save_extra: Callable[[Path], None],
) -> PreferenceTrainer:
    """One stage. The best checkpoint by held-out agreement (language modelling: by loss) is the one that is kept."""
    sft = reference is None
    if sft:
        train_groups, eval_groups = ([_best_only(group) for group in groups] for groups in (train_groups, eval_groups))
    epochs = config.sft_epochs if sft else config.epochs
    steps = max(1, math.ceil(math.ceil(len(train_groups) / config.batch_size) * epochs))
    every = max(1, steps // config.evals)
    args = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=config.batch_size,
        max_steps=steps,
        learning_rate=config.sft_learning_rate if sft else config.learning_rate,
        warmup_steps=round(config.warmup_ratio * steps),
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="best",
        save_total_limit=1,
        metric_for_best_model="eval_loss" if sft else "eval_agreement",
        greater_is_better=not sft,
        logging_steps=max(1, min(20, every)),
        report_to=[],
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if args.n_gpu > 1:
        logger.warning("several GPUs are visible and one is used; start the command with torchrun to use them all")
        args._n_gpu = 1
    trainer = PreferenceTrainer(
        policy, reference, config, train_groups=train_groups, eval_groups=eval_groups, args=args, save_extra=save_extra
    )
    trainer.train()
    if sft:
        policy.load_state_dict(load_model(trainer.state.best_model_checkpoint, policy.device, policy.dtype).state_dict())
    return trainer


def _best_only(item: TrainingGroup) -> TrainingGroup:
    best = max(range(len(item.targets)), key=item.targets.__getitem__)
    return TrainingGroup(replace(item.group, candidates=[item.group.candidates[best]]), (item.targets[best],))


def _copy(model: Any) -> Any:
    import copy

    frozen = copy.deepcopy(model)
    frozen.config._attn_implementation = "sdpa" if frozen._supports_sdpa else "eager"
    return frozen

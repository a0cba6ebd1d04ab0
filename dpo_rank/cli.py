"""The command line: one thin function a command."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dpo_rank import tables
from dpo_rank.errors import DataError, DpoRankError, MissingExtraError
from dpo_rank.files import appearing

if TYPE_CHECKING:
    from dpo_rank.data.formats import Example, OnError, Problems
    from dpo_rank.evaluation.baselines import Scored
    from dpo_rank.ranker import Ranker
    from dpo_rank.ranking import Ranking

app = typer.Typer(
    name="dpo-rank",
    help="Rank candidate answers by what people would prefer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure a ranker on rows of your own.", no_args_is_help=True)
app.add_typer(bench, name="bench")
errors = Console(stderr=True)
screen = Console()

RankerOption = Annotated[str, typer.Option("--ranker", "-r", help="Directory or hub id of a ranker; 'starter' is the embedded one.")]
EngineOption = Annotated[str, typer.Option(help="auto, onnx or torch.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PrecisionOption = Annotated[str, typer.Option(help="auto, or one that the ranker holds (fp32, int8, ...).")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; by default all that this process may use.")]
InputOption = Annotated[
    str | None, typer.Option("--input", "-i", help="Rows to read: .jsonl, .jsonl.gz, .json lines, .parquet; '-': stdin.")
]
OutputOption = Annotated[str, typer.Option("--output", "-o", help="Where the rows go with a 'ranking' added; '-': stdout.")]
OnErrorOption = Annotated[str, typer.Option(help="What a bad row does: 'raise' stops (nothing is written), 'skip' goes on and counts.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
PassageOption = Annotated[list[str] | None, typer.Option("--passage", "-p", help="A text the answers should rest on; may be repeated.")]
ROW_CHUNK = 64


def main() -> None:
    """Entry point: errors of the package become one line and exit code 2."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors, show_time=False, show_path=False)]
    )
    try:
        app()
    except DpoRankError as error:
        errors.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


@app.command()
def rank(
    prompt: Annotated[str | None, typer.Argument(help="The prompt, and after it the answers.")] = None,
    answers: Annotated[list[str] | None, typer.Argument(help="Candidate answers.")] = None,
    ranker: RankerOption = "starter",
    input: InputOption = None,
    output: OutputOption = "-",
    passage: PassageOption = None,
    top_k: Annotated[int | None, typer.Option(help="Show the first so many.")] = None,
    on_error: OnErrorOption = "raise",
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the best answer first.

    [bold]dpo-rank rank[/] "How do I boil an egg?" "In water, 7 minutes." "No."

    [bold]dpo-rank rank[/] --input rows.jsonl --output ranked.jsonl
    """
    loaded = _load(ranker, engine, device, precision, threads)
    if input is not None:
        _rank_rows(loaded, input, output, on_error, (prompt, answers, passage, top_k))
        return
    prompt, answers = _given(prompt, answers)
    ranking = loaded.rank(prompt, answers, top_k=top_k, passages=passage)
    if as_json:
        _print_json({**ranking.to_dict(), "ranker": loaded.name})
        return
    screen.print(tables.of_ranking(ranking, loaded))
    if ranking.near_tie:
        screen.print("Near tie: the first is barely ahead of the second.", style="yellow")


@app.command()
def score(
    prompt: Annotated[str | None, typer.Argument(help="The prompt, and after it the answers.")] = None,
    answers: Annotated[list[str] | None, typer.Argument(help="Candidate answers.")] = None,
    ranker: RankerOption = "starter",
    input: InputOption = None,
    output: OutputOption = "-",
    passage: PassageOption = None,
    on_error: OnErrorOption = "raise",
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Raw rewards, in the order of the answers. They compare answers to one prompt, not prompts with each other."""
    loaded = _load(ranker, engine, device, precision, threads)
    if input is not None:
        _rank_rows(loaded, input, output, on_error, (prompt, answers, passage, None))
        return
    prompt, answers = _given(prompt, answers)
    scores = [float(value) for value in loaded.score(prompt, answers, passages=passage)]
    if as_json:
        _print_json({"scores": scores, "ranker": loaded.name})
        return
    table = Table(title=f"{loaded.name}: raw rewards")
    table.add_column("score", justify="right")
    table.add_column("answer")
    for value, answer in zip(scores, answers, strict=True):
        table.add_row(f"{value:.4f}", _escape(answer))
    screen.print(table)


@app.command()
def train(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Path or hub id to start from; 'starter': the starter's base, from a checkout.")
    ],
    data: Annotated[str, typer.Option("--data", "-d", help="Preference rows: a file or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the ranker to make.")],
    eval_data: Annotated[str | None, typer.Option(help="Held-out rows; by default 5 % of the prompts are held out.")] = None,
    reference: Annotated[str | None, typer.Option(help="Frozen reference; by default the start itself.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Settings in TOML or YAML; options given here win.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for any setting of DPOConfig or TrainingArguments; may be repeated.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option("--loss-type", "--loss", help="sigmoid, softmax, ipo, ...; by default sigmoid, pointwise for single answers."),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Strength of the reference [0.1].")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Of the DPO stage [5e-5].")] = None,
    epochs: Annotated[float | None, typer.Option("--num-train-epochs", "--epochs", help="Of the DPO stage [1].")] = None,
    batch_size: Annotated[int | None, typer.Option("--per-device-train-batch-size", "--batch-size", help="Prompts a step [8].")] = None,
    sft: Annotated[bool | None, typer.Option("--sft", help="First train on the best answers by language modelling.")] = None,
    lora: Annotated[int | None, typer.Option("--lora", help="Train LoRA adapters of this rank; the artifact holds one base.")] = None,
    train_layers: Annotated[int | None, typer.Option(help="Train only the top so many layers; the pair shares the rest.")] = None,
    precompute: Annotated[
        bool | None, typer.Option("--precompute-ref-log-probs", help="Score the rows under the reference once, before training.")
    ] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longer prompts lose their left.")] = None,
    max_completion_tokens: Annotated[int | None, typer.Option(help="Longer answers lose their tail.")] = None,
    evals: Annotated[int | None, typer.Option(help="How often the held-out rows are scored and a checkpoint is written [4].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random [42].")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16", help="Mixed precision.")] = None,
    boundary: Annotated[str | None, typer.Option(help="'split', or 'joint' as TRL tokenises [split].")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="ONNX precisions, the default first; may be repeated [fp32, int8].")] = None,
    export: Annotated[bool | None, typer.Option("--export/--no-export", help="Write the graphs that run without torch.")] = None,
    keep_models: Annotated[bool | None, typer.Option("--keep-models/--no-keep-models", help="Store both models' weights too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Describe the rows, time one step, and write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint of the same run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    on_error: OnErrorOption = "raise",
    as_json: JsonOption = False,
) -> None:
    """Train a ranker on preferences, and export it.

    [bold]dpo-rank train[/] --model starter --data pairs.jsonl --output my-ranker

    Ctrl-C finishes the step, writes a checkpoint and stops; the same command with --resume goes on.
    """
    try:
        from dpo_rank.training import run
        from dpo_rank.training.settings import adapter, read_settings
    except ImportError:
        raise MissingExtraError("training", "train") from None
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and writing files; training shows its own
    options = {
        "loss_type": loss,
        "beta": beta,
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "sft": sft,
        "train_layers": train_layers,
        "precompute_ref_log_probs": precompute,
        "max_prompt_tokens": max_prompt_tokens,
        "max_completion_tokens": max_completion_tokens,
        "evals": evals,
        "seed": seed,
        "bf16": bf16,
        "boundary": None if boundary is None else _one_of("boundary", boundary, ("split", "joint")),
        "precisions": tuple(precision) if precision else None,
        "export": export,
        "keep_models": keep_models,
        "on_error": _on_error(on_error),
    }
    found = read_settings(config, settings or (), {name: value for name, value in options.items() if value is not None})
    peft_config = None if lora is None else adapter(lora)
    if dry_run:
        report = run.dry_run(model, data, eval_data=eval_data, reference=reference, config=found, peft_config=peft_config)
        if as_json:
            _print_json({**report.data.to_dict(), "held_out_rows": report.held_out_rows, "loss": report.loss, "memory": report.memory,
                         "seconds_a_step": report.seconds_a_step, "problems": report.problems.messages})  # fmt: skip
        else:
            screen.print(tables.of_dry_run(report))
        return
    result = run.train(
        model,
        data,
        output,
        eval_data=eval_data,
        reference=reference,
        config=found,
        peft_config=peft_config,
        resume=resume,
        overwrite=overwrite,
        say=lambda text: errors.print(f"[dim]{_escape(text)}[/]"),
    )
    if result.problems:
        errors.print(f"[yellow]{_escape(str(result.problems))}[/]")
    if as_json:
        _print_json({"output": str(result.output), **result.facts})
        return
    if "held_out" in result.facts:
        screen.print(tables.of_held_out(result.facts["held_out"], str(result.output)))
    screen.print(tables.of_run(result.facts), f"curves: {result.curves}" if result.curves else "")
    screen.print(f"Ranker.load({str(result.output)!r}) or: dpo-rank rank --ranker {result.output} PROMPT ANSWER ANSWER")


@app.command()
def export(
    policy: Annotated[str, typer.Option(help="Path or hub id of a DPO-trained policy (or adapter).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the ranker to make.")],
    reference: Annotated[
        str | None, typer.Option(help="Path or hub id of the reference it was trained against; none for an adapter.")
    ] = None,
    beta: Annotated[float, typer.Option(help="Of the training run.")] = 0.1,
    reward: Annotated[str, typer.Option(help="'sum', or 'mean' where the loss compared means (IPO, length-normalised).")] = "sum",
    boundary: Annotated[str, typer.Option(help="'split', or 'joint' for pairs trained on joint tokenisation.")] = "split",
    string_prompt: Annotated[str | None, typer.Option(help="What a plain text prompt is: user_turn or verbatim.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="ONNX precisions, the default first; may be repeated [fp32, int8].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Turn a pair that others trained into a ranker that runs without torch.

    [bold]dpo-rank export[/] --policy P --reference R --beta 0.1 --output my-ranker
    """
    from dpo_rank.ranker import Ranker

    pair = Ranker.from_models(
        policy,
        reference,
        beta=beta,
        reward=_one_of("reward", reward, ("sum", "mean")),
        boundary=_one_of("boundary", boundary, ("split", "joint")),
        string_prompt=None if string_prompt is None else _one_of("string_prompt", string_prompt, ("user_turn", "verbatim")),
        device="cpu",
    )
    with errors.status("exporting"):
        path = pair.export(output, tuple(precision) if precision else ("fp32", "int8"), overwrite=overwrite)
    screen.print(
        f"{path}: exported and checked against torch. Its temperature is not fitted: dpo-rank calibrate --ranker {path} --data ROWS"
    )


@app.command()
def evaluate(
    data: Annotated[str | None, typer.Option("--data", "-d", help="Labelled rows: a file or a hub id.")] = None,
    ranker: RankerOption = "starter",
    rankings: Annotated[str | None, typer.Option(help="Rows with a 'ranking' already in them (by any ranker): no model is run.")] = None,
    report: Annotated[Path | None, typer.Option(help="Directory for a page (HTML), JSON, a summary and each row's scores.")] = None,
    compare: Annotated[str | None, typer.Option(help="Another ranker of ours, by path or id, compared row by row.")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="cross-encoder:ID, reward-model:ID, ranker:ID, ensemble:ID,ID, rankings:FILE, module:function; may be repeated."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="reward-bench, reward-bench-2, rm-bench or judgebench, in its own schema.")] = None,
    train_data: Annotated[str | None, typer.Option(help="Rows it was trained on, to find prompts that stand on both sides.")] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Key of the rows to slice by; may be repeated [subset, source, domain, language].")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first so many rows.")] = None,
    on_error: OnErrorOption = "raise",
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    correction: Annotated[bool, typer.Option("--correction", help="With the ranker's correction for length.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How often a ranker agrees with labels, how sure it is, and what rules that read no meaning would get.

    [bold]dpo-rank evaluate[/] --ranker R --data held-out.jsonl --report out/
    """
    import itertools
    from dataclasses import replace

    from dpo_rank.data.formats import Problems, read
    from dpo_rank.evaluation import baselines, presets
    from dpo_rank.evaluation.evaluate import BY, assemble
    from dpo_rank.evaluation.evaluate import evaluate as measure
    from dpo_rank.evaluation.report import finite, write_report

    problems = Problems()
    keys = tuple(by) if by else BY
    source = rankings if rankings is not None else data
    if preset is None and source is None:
        raise DataError("nothing to evaluate on: give --data, --rankings or --preset")
    if preset is not None:
        rows = presets.rows(preset, source)
        source = source or presets.PRESETS[preset].source
    else:
        rows = read(_source(source or ""), on_error=_on_error(on_error), problems=problems)
    examples = list(itertools.islice(rows, limit))
    used = [example for example in examples if example.pairs()]
    seen = list(read(_source(train_data), on_error="skip")) if train_data is not None else []
    specs = [*(baseline or ()), *([] if compare is None else [f"ranker:{compare}"])]
    others = [_rankings_of(spec, used) if spec.startswith("rankings:") else spec for spec in specs]
    explain = None
    assert source is not None
    if rankings is not None:
        name, scores = _given_scores(used)
        found = assemble(
            baselines.Scored(name, scores), [*baselines.by_rules(used), *baselines.beside(others, used)], used, source, by=keys, train=seen
        )
    else:
        loaded = _load(ranker, engine, device, precision, threads, correction)
        with _progress("scoring", len(examples)) as step:
            found = measure(loaded, examples, source, by=keys, others=others, train=seen, progress=step)

        def explain(example: Example, index: int) -> Any:
            return loaded.explain(example.prompt, example.candidates[index], passages=example.passages or None)

    if preset is not None:
        found = replace(found, published=presets.PRESETS[preset].aggregate(found.examples, found.scores))
    _tell(problems)
    page = None if report is None else write_report(found, report, explain, f"dpo-rank {' '.join(sys.argv[1:])}")
    if as_json:
        _print_json({**finite(found.to_dict()), "skipped": len(problems), "report": None if page is None else str(page)})
        return
    screen.print(tables.of_evaluation(found), tables.of_slices(found))
    if found.published:
        screen.print(tables.of_published(found.published, str(preset)))
    screen.print(f"Style: {_escape(found.length.verdict)}. Length explains {found.explained['length']:.0%} of the scores' variance.")
    if found.sureness is not None:
        stored = found.sureness.stored
        screen.print(
            f"Calibration error {stored.ece.value:.3f} at temperature {stored.temperature:.3g} (a perfect model here: "
            f"{stored.ece_of_perfect:.3f})."
        )
    for text in found.warnings:
        screen.print(f"[yellow]{_escape(text)}[/]")
    if page is not None:
        screen.print(f"report: {page}")


@app.command()
def calibrate(
    data: Annotated[str, typer.Option("--data", "-d", help="Labelled rows that the ranker was not trained on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the ranker goes with what was fitted.")],
    ranker: RankerOption = "starter",
    correction: Annotated[bool, typer.Option("--correction", help="Fit a correction for length too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    on_error: OnErrorOption = "raise",
    as_json: JsonOption = False,
) -> None:
    """Fit what turns margins into probabilities, tells when to abstain, and knows unfamiliar prompts."""
    from dpo_rank.data.formats import Problems, read

    loaded = _load(ranker, "auto", "auto", "auto", None)
    problems = Problems()
    report = loaded.calibrate(read(_source(data), on_error=_on_error(on_error), problems=problems), correction=correction)
    loaded.save(output, overwrite=overwrite)
    _tell(problems)
    if as_json:
        _print_json({"output": str(output), **report.to_dict()})
        return
    screen.print(tables.of_calibration(report), f"saved to {output}")


@app.command()
def info(ranker: RankerOption = "starter", as_json: JsonOption = False) -> None:
    """What is installed, what can be used here, and what a ranker says of itself."""
    from dpo_rank.environment import describe

    loaded = _load(ranker, "auto", "auto", "auto", None)
    manifest = loaded.manifest
    facts = {
        "ranker": loaded.name,
        "engine": loaded.engine,
        "device": loaded.device,
        "precision": loaded.precision,
        "precisions": list(manifest.precisions),
        "default_precision": manifest.default_precision,
        "beta": manifest.beta,
        "reward": manifest.reward,
        "temperature": manifest.temperature,
        "calibrated": manifest.calibrated,
        "reads at most": f"{manifest.limits.max_prompt_tokens} prompt + {manifest.limits.max_completion_tokens} answer tokens",
        "passages": manifest.passage_format is not None,
    }
    here = describe()
    if as_json:
        _print_json({"ranker": facts, **here})
        return
    for title, content in (("ranker", facts), ("packages", here["packages"]), ("engines", here["engines"])):
        table = Table(title=title, show_header=False, title_justify="left")
        for key, value in content.items():
            table.add_row(str(key), _escape(str(value)))
        screen.print(table)
    for problem in here["problems"]:
        screen.print(f"[yellow]{_escape(problem)}[/]")


@bench.command("latency")
def bench_latency(
    data: Annotated[str, typer.Option("--data", "-d", help="Rows with prompts and candidates; labels are not needed.")],
    ranker: RankerOption = "starter",
    limit: Annotated[int, typer.Option(min=1, help="Read the first so many rows.")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="Rankings of each row; its median counts.")] = 3,
    engine: Annotated[str, typer.Option(help="Only this engine.")] = "",
    precision: Annotated[str, typer.Option(help="Only this precision.")] = "",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """How long one prompt takes, with every engine and precision that can run here. Leave the machine otherwise idle."""
    import itertools

    from dpo_rank.data.formats import read
    from dpo_rank.evaluation.latency import measure, ways
    from dpo_rank.ranker import Ranker
    from dpo_rank.scoring.graph_engine import available_cpus

    examples = list(itertools.islice(read(_source(data)), limit))
    if not examples:
        raise DataError(f"{data}: no rows")
    known = Ranker.load(ranker)
    which = [way for way in ways(known) if engine in ("", way[0]) and precision in ("", way[1])]
    if not which:
        raise DataError(f"{known.name} runs in {', '.join(' '.join(way) for way in ways(known))}; not in {engine} {precision}".rstrip())
    name = known.name
    del known
    reports = []
    with _progress("measuring", len(which)) as step:
        for report in measure(lambda e, p: Ranker.load(ranker, engine=e, precision=p, threads=threads), which, examples, repeats):
            reports.append(report)
            step(1)
    count = threads or available_cpus()
    if as_json:
        _print_json({"ranker": name, "rows": len(examples), "threads": count, "reports": [report.to_dict() for report in reports]})
        return
    screen.print(tables.of_latency(reports, name, len(examples), count))


# -- inside ------------------------------------------------------------------------------------------------------------


def _load(ranker: str, engine: str, device: str, precision: str, threads: int | None, correction: bool = False) -> Ranker:
    from dpo_rank.ranker import Ranker

    return Ranker.load(ranker, engine=engine, device=device, precision=precision, threads=threads, correction=correction)


def _given(prompt: str | None, answers: list[str] | None) -> tuple[str, list[str]]:
    if prompt is None:
        raise DataError("nothing to rank: give a prompt and answers, or --input rows.jsonl")
    if not answers:
        raise DataError("a prompt and no answers: give at least one answer after the prompt")
    return prompt, answers


def _source(name: str) -> Any:
    from dpo_rank.data.formats import JsonLines

    return JsonLines(sys.stdin, "stdin") if name == "-" else name


def _one_of(name: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise DataError(f"{name} is {' or '.join(known)}, not {value!r}")
    return value


def _on_error(value: str) -> OnError:
    found: OnError = _one_of("on-error", value, ("raise", "skip"))
    return found


def _tell(problems: Problems) -> None:
    if problems:
        errors.print(f"[yellow]{_escape(str(problems))}[/]")


def _rank_rows(ranker: Ranker, source: str, output: str, on_error: str, unused: tuple[Any, ...]) -> None:
    """Rows in, the same rows with a ``ranking`` out; a file appears when it is complete."""
    from dpo_rank.data.formats import Problems, read

    if any(unused):
        raise DataError("--input reads prompts, answers and passages from rows: leave out the arguments and --passage, --top-k")
    mode = _on_error(on_error)
    problems = Problems()
    examples = read(_source(source), labelled=False, on_error=mode, problems=problems)
    with _output(output) as lines, _progress("ranking", None) as step:
        for chunk in _chunks(examples):
            for example, ranking in zip(chunk, _rank_chunk(ranker, chunk, mode, problems), strict=True):
                if ranking is not None:
                    lines.write(json.dumps({**example.raw, "ranking": ranking_entry(ranking, ranker.name)}, ensure_ascii=False) + "\n")
            step(len(chunk))
    _tell(problems)


def _rank_chunk(ranker: Ranker, chunk: list[Example], mode: str, problems: Problems) -> list[Ranking | None]:
    """Rankings of a chunk; where it fails as a whole, row by row, so that only the bad row is lost."""
    try:
        return list(
            ranker.rank_many([e.prompt for e in chunk], [e.candidates for e in chunk], passages=[e.passages or None for e in chunk])
        )
    except DataError:
        found: list[Ranking | None] = []
        for example in chunk:
            try:
                found.append(ranker.rank(example.prompt, example.candidates, passages=example.passages or None))
            except DataError as error:
                if mode == "raise":
                    raise DataError(f"{example.where}: {error}") from None
                problems.messages.append(f"{example.where}: {error}")
                found.append(None)
        return found


def ranking_entry(ranking: Ranking, name: str) -> dict[str, Any]:
    """What a ranked row carries: ``order`` best first; the other lists in the order of the row's candidates."""
    by_index = sorted(ranking, key=lambda candidate: candidate.index)
    return {
        "order": ranking.order,
        "scores": [candidate.score for candidate in by_index],
        "probabilities": [candidate.probability for candidate in by_index],
        "truncated": [candidate.truncated for candidate in by_index],
        "ranker": name,
    }


def _given_scores(examples: Sequence[Example]) -> tuple[str, list[Any]]:
    """Scores that rows bring along, from their ``ranking``'s scores or order."""
    import numpy as np

    found, names = [], set()
    for example in examples:
        entry = example.raw.get("ranking")
        if not isinstance(entry, dict):
            raise DataError(f"{example.where}: field 'ranking' is missing")
        count = len(example.candidates)
        scores, order = entry.get("scores"), entry.get("order")
        if scores is None and isinstance(order, list) and sorted(order) == list(range(count)):
            scores = [-order.index(index) for index in range(count)]
        if not isinstance(scores, list) or len(scores) != count or not all(isinstance(s, (int, float)) for s in scores):
            raise DataError(f"{example.where}: field 'ranking': needs {count} scores, or an order of {count} indices")
        found.append(np.array(scores, dtype=np.float64))
        names.add(str(entry.get("ranker", "rankings")))
    return " + ".join(sorted(names)), found


def _rankings_of(spec: str, used: Sequence[Example]) -> Scored:
    """Scores that another file's rows bring along, for the same prompts in the same order."""
    from dpo_rank.data.formats import prompt_hash, read
    from dpo_rank.evaluation.baselines import Scored

    name = spec.partition(":")[2]
    theirs = {prompt_hash(example.prompt): example for example in read(_source(name), labelled=False)}
    rows = []
    for example in used:
        other = theirs.get(prompt_hash(example.prompt))
        if other is None or [c.text for c in other.candidates] != [c.text for c in example.candidates]:
            raise DataError(f"{name}: has no ranking of the candidates of {example.where}")
        rows.append(other)
    found, scores = _given_scores(rows)
    return Scored(f"{found} ({Path(name).name})", scores)


def _chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == ROW_CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def _output(name: str) -> Iterator[IO[str]]:
    """stdout, or a file that replaces ``name`` once everything is written."""
    if name == "-":
        yield sys.stdout
        return
    with appearing(Path(name)) as file:
        yield file


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()

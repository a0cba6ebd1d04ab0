"""How far a ranker agrees with the labels of each data set, beside every rule and rival that could embarrass it.

    python benchmarks/agreement.py                      # the starter and the rules, on every .test file
    python benchmarks/agreement.py --rivals runs/rivals # also rivals trained on the same pairs from the same base; minutes each, once

Reads the files of the folder that DPO_RANK_DATA names; one that is absent is named as skipped. Run on an otherwise idle machine: it times
each ranker. Rivals need ``pip install 'dpo-rank[student,dev]'``; what is not installed is named as not run. Writes
docs/results/agreement.json and .md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_rank import Ranker, tables
from dpo_rank.data.formats import read
from dpo_rank.errors import DpoRankError
from dpo_rank.evaluation.agreement import Scorer
from dpo_rank.evaluation.baselines import ClassifierScorer, CrossEncoderScorer, Scored, by_scorer
from dpo_rank.evaluation.evaluate import Evaluation, evaluate

FILES = ("hh_harmless.test", "mtbench_human.test", "llmbar.test", "halueval_qa.test", "gsm8k_solutions.test", "alpacaeval_16.test")
BASE = Path(__file__).parents[1] / "models" / "starter-base"
RIVALS = ("dpo_rank, trained on hh_harmless", "Bradley-Terry model (TRL), trained on hh_harmless", "cross-encoder, trained on hh_harmless")
SEED, EPOCHS, BATCH, MAX_TOKENS = 0, 1, 8, 1024


def pairs_of(data: Path) -> list[dict[str, str]]:
    """hh_harmless.train with each prompt as one text, for libraries that take texts."""
    with gzip.open(data / "hh_harmless.train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]

    def text(value: Any) -> str:
        return value if isinstance(value, str) else "\n".join(turn["content"] for turn in value)

    return [{name: text(row[name]) for name in ("prompt", "chosen", "rejected")} for row in rows]


def classifier(path: Path | None = None) -> tuple[Any, Any]:
    """The starter's base with one output, and its tokenizer; or a trained one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path or BASE)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(path or BASE, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def train_bradley_terry(data: Path, target: Path) -> None:
    """TRL's RewardTrainer, its defaults but for batch, length and one epoch at 5e-5."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model, tokenizer = classifier()
    scorer = ClassifierScorer(model, tokenizer)
    rows = [{name: scorer.render(row["prompt"], row[name]) for name in ("chosen", "rejected")} for row in pairs_of(data)]
    args = RewardConfig(
        str(target / "run"), per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS, learning_rate=5e-5, max_length=MAX_TOKENS,
        gradient_checkpointing=False, bf16=False, save_strategy="no", report_to="none", seed=SEED, disable_tqdm=True,
    )  # fmt: skip
    RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def train_cross_encoder(data: Path, target: Path) -> None:
    """sentence-transformers' CrossEncoderTrainer with its binary cross-entropy: chosen 1, rejected 0."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = cross_encoder(BASE)
    rows = [
        {"query": row["prompt"], "answer": row[name], "label": float(name == "chosen")}
        for row in pairs_of(data)
        for name in ("chosen", "rejected")
    ]
    args = CrossEncoderTrainingArguments(
        str(target / "run"), per_device_train_batch_size=2 * BATCH, num_train_epochs=EPOCHS, learning_rate=5e-5, save_strategy="no",
        report_to="none", seed=SEED, disable_tqdm=True,
    )  # fmt: skip
    assert isinstance(model, CrossEncoder)
    CrossEncoderTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), loss=BinaryCrossEntropyLoss(model)).train()
    model.save_pretrained(str(target))


def cross_encoder(path: Path) -> Any:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(path), num_labels=1, max_length=MAX_TOKENS)
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token
    model.model.config.pad_token_id = model.tokenizer.pad_token_id
    return model


def train_ours(data: Path, target: Path) -> None:
    """`dpo-rank train --model starter`, its defaults."""
    from dpo_rank.training import DPOConfig, run

    run.train(str(BASE), data / "hh_harmless.train.jsonl.gz", target, config=DPOConfig(precisions=("fp32",), seed=SEED), overwrite=True)


def rivals(data: Path, folder: Path) -> list[tuple[str, Scorer | str]]:
    """Trained rivals by name, trained now where they were not; the reason where one cannot be."""
    makers = zip(RIVALS, (train_ours, train_bradley_terry, train_cross_encoder), strict=True)
    found: list[tuple[str, Scorer | str]] = []
    for name, make in makers:
        target = (folder / name.partition(",")[0].replace(" ", "-")).resolve()
        try:
            if not (target.parent / f"{target.name}.json").is_file():
                Console().print(f"[dim]training: {name}[/]")
                start = time.perf_counter()
                target.parent.mkdir(parents=True, exist_ok=True)
                make(data, target)
                (target.parent / f"{target.name}.json").write_text(json.dumps({"seconds": time.perf_counter() - start}))
            if name == RIVALS[0]:
                found.append((name, Ranker.load(target)))
            elif name == RIVALS[1]:
                model, tokenizer = classifier(target)
                found.append((name, ClassifierScorer(model.eval(), tokenizer)))
            else:
                found.append((name, CrossEncoderScorer(cross_encoder(target))))
        except (ImportError, DpoRankError) as error:
            found.append((name, str(error).splitlines()[0]))
    return found


def by_rivals(others: list[tuple[str, Scorer | str]], examples: list[Any]) -> list[Scored]:
    """The rivals' scores, or why there are none."""
    return [
        Scored(name, [], problem=scorer) if isinstance(scorer, str) else by_scorer(name, lambda scorer=scorer: scorer, examples)
        for name, scorer in others
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement of a ranker with the labels of several data sets.")
    parser.add_argument("--ranker", default="starter")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DPO_RANK_DATA", "../shared/data")))
    parser.add_argument("--most", type=int, default=None, help="rows of each file at most")
    parser.add_argument("--rivals", type=Path, default=None, help="where rivals trained on hh_harmless.train are kept")
    parser.add_argument(
        "--rivals-not-on", nargs="*", default=[], help="files on which the rivals are not run (16 long answers a prompt take them minutes)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    console = Console()
    ranker = Ranker.load(args.ranker)
    others = rivals(args.data, args.rivals) if args.rivals is not None else [(name, "not asked for (--rivals)") for name in RIVALS]
    evaluations: dict[str, Evaluation] = {}
    for name in FILES:
        path = args.data / f"{name}.jsonl.gz"
        if not path.is_file():
            console.print(f"{name}: skipped, {path} is absent")
            continue
        examples = [example for example in read(path) if example.pairs()][: args.most]
        left_out = [(rival, f"left out on {name}") for rival in RIVALS]
        beside = by_rivals(left_out if name in args.rivals_not_on else others, examples)
        evaluations[name] = evaluate(ranker, examples, str(path), others=beside, perturb=name == FILES[0])
        console.print(tables.of_evaluation(evaluations[name]), evaluations[name].length.verdict, *evaluations[name].warnings, sep="\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    machine = {"peak_memory_mib": round(peak), "threads": os.cpu_count(), "ranker": repr(ranker)}
    args.output.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine, **{name: plain(found) for name, found in evaluations.items()}}
    (args.output / "agreement.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (args.output / "agreement.md").write_text(markdown(evaluations), encoding="utf-8")


def plain(found: Evaluation) -> dict[str, Any]:
    """As plain data, paths left out."""
    data = found.to_dict()
    data["source"] = Path(data["source"]).name
    return data


def markdown(evaluations: dict[str, Evaluation]) -> str:
    """A table of agreement, and a section a file."""
    names = [item.name for item in next(iter(evaluations.values())).scored]
    lines = [
        "Share of labelled pairs in the labels' order; in brackets the 95 % interval of the difference to the first ranker, paired by prompt: "
        "a ranker is better than the first where the whole interval is below 0.",
        "",
        "| ranker | " + " | ".join(evaluations) + " |",
        "|---|" + "---|" * len(evaluations),
    ]
    lines += [f"| {name} | " + " | ".join(cell(found, name) for found in evaluations.values()) + " |" for name in names]
    lines += ["", "| milliseconds a prompt | " + " | ".join(evaluations) + " |", "|---|" + "---|" * len(evaluations)]
    for name in names:
        times = [next(item.ms_a_prompt for item in found.scored if item.name == name) for found in evaluations.values()]
        if any(time is not None for time in times):
            lines.append(f"| {name} | " + " | ".join("" if time is None else f"{time:.1f}" for time in times) + " |")
    for file, found in evaluations.items():
        lines += ["", f"### {file}", "", *(f"> {text}\n>" for text in found.warnings)]
        lines += [f"- {found.length.verdict}; {explained(found)}"]
        if found.correction:
            gain = found.correction.gain
            lines.append(
                f"- corrected for length (fitted on the other half): {found.correction.after.value:.3f}, a change of {gain.value:+.3f} "
                f"({gain.low:+.3f} to {gain.high:+.3f})"
            )
        if found.sureness:
            stored, fitted = found.sureness.stored, found.sureness.fitted
            lines.append(
                f"- calibration error {stored.ece.value:.3f} ({stored.ece.low:.3f} to {stored.ece.high:.3f}) at the stored temperature, "
                f"{fitted.ece.value:.3f} at the best one; a perfect model: {stored.ece_of_perfect:.3f}"
            )
            if found.sureness.unfamiliar is not None:
                lines.append(f"- {found.sureness.unfamiliar:.1%} of the prompts are unfamiliar to it")
        measures = found.reports[0].measures
        if measures:
            longest = next(report for report in found.reports if report.name == "longest").measures
            shown = ", ".join(f"{key} {value.value:.3f} ({longest[key].value:.3f})" for key, value in measures.items())
            lines.append(f"- lists, in brackets the longest answer's: {shown}")
        for key, groups in found.reports[0].slices.items():
            lines.append(
                f"- by {key}: " + ", ".join(f"{value} {figure.value:.3f} (n={figure.num_prompts})" for value, figure in groups.items())
            )
    return "\n".join(lines) + "\n"


def cell(found: Evaluation, name: str) -> str:
    item = next(item for item in found.scored if item.name == name)
    if item.problem:
        return "not run"
    report = next(report for report in found.reports if report.name == name)
    gap = next((c.agreement for c in found.comparisons if c.second == name), None)
    shown = f"{report.agreement.value:.3f}"
    return (
        f"**{shown}** ({report.agreement.low:.3f} to {report.agreement.high:.3f})"
        if gap is None
        else f"{shown} ({gap.low:+.3f} to {gap.high:+.3f})"
    )


def explained(found: Evaluation) -> str:
    return f"length explains {found.explained['length']:.0%} of the scores' variance, style as a whole {found.explained['all']:.0%}"


if __name__ == "__main__":
    main()

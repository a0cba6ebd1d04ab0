"""Which loss ranks best: runs from the starter's base, at most a few minutes each, several seeds, agreement on held-out rows.

    python benchmarks/losses.py pairs     # hh_harmless: trained on its train side, measured on its test side
    python benchmarks/losses.py lists     # alpacaeval_16, for this comparison only
    python benchmarks/losses.py settings  # learning rates, betas, epochs and warm-ups of the default losses

Goes on where it stopped. Each run is compared with the default's of the same seed on the same prompts: the interval is a bootstrap over
prompts of the mean difference over seeds. Writes docs/results/losses.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpo_rank import Ranker
from dpo_rank.data.formats import Example, read
from dpo_rank.evaluation.agreement import pair_agreement, score_examples
from dpo_rank.evaluation.intervals import figure
from dpo_rank.evaluation.lists import best_of_n
from dpo_rank.evaluation.style import length_controlled
from dpo_rank.training import DPOConfig, DPOTrainer
from dpo_rank.training.heldout import measure

BASE = Path(__file__).parents[1] / "models" / "starter-base"
PAIRS = {
    "sigmoid": {},
    "sigmoid, label_smoothing 0.1": {"label_smoothing": 0.1},
    "sigmoid, length_alpha 0.01": {"length_alpha": 0.01},
    "robust 0.1": {"loss_type": "robust", "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 2.0},
    "pointwise": {"loss_type": "pointwise"},
    "kto": {"loss_type": "kto"},
    "TRL's DPOTrainer, sigmoid": {"trl": True},
}
LISTS = {
    "softmax": {},
    "softmax, temperature 0.5": {"loss_temperature": 0.5},
    "plackett_luce": {"loss_type": "plackett_luce"},
    "listnet": {"loss_type": "listnet", "target_temperature": 0.2},
    "lambda_ndcg": {"loss_type": "lambda_ndcg"},
    "sigmoid": {"loss_type": "sigmoid"},
}
SETTINGS = {
    "default": {},
    "learning_rate 2e-5": {"learning_rate": 2e-5},
    "learning_rate 1e-4": {"learning_rate": 1e-4},
    "learning_rate 3e-4": {"learning_rate": 3e-4},
    "beta 0.03": {"beta": 0.03},
    "beta 0.3": {"beta": 0.3},
    "epochs 2": {"num_train_epochs": 2},
    "no warm-up": {"warmup_steps": 0},
    "lora 16, learning_rate 1e-3": {"lora": 16, "learning_rate": 1e-3},
    "train_layers 2, learning_rate 1e-4": {"train_layers": 2, "learning_rate": 1e-4},
}
KINDS = {"pairs": ("hh_harmless", PAIRS), "lists": ("alpacaeval_16", LISTS), "settings": ("hh_harmless", SETTINGS)}


def rows_of(data: Path, name: str, side: str, limit: int, width: int) -> list[Example]:
    """The first rows; of lists, the first ``width`` candidates."""
    found = []
    for row in itertools.islice(read(str(data / f"{name}.{side}.jsonl.gz")), limit):
        assert row.scores is not None
        cut = Example(row.prompt, row.candidates[:width], row.scores[:width], row.passages, row.where)
        if cut.pairs():
            found.append(cut)
    return found


def run(settings: dict[str, Any], seed: int, train: list[Example], test: list[Example]) -> dict[str, Any]:
    """Train once; agreement of each test row, and of lists the label of the answer ranked first."""
    from dpo_rank.training.settings import adapter

    options = dict(settings)
    if options.pop("trl", False):
        return run_trl(seed, train, test)
    lora = options.pop("lora", None)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        args = DPOConfig(
            scratch, **{"learning_rate": 5e-5, "save_strategy": "no", "bf16": True, "max_prompt_tokens": 512, "max_completion_tokens": 512,
                        "per_device_train_batch_size": 4 if len(train[0].candidates) > 2 else 8, "seed": seed, "disable_tqdm": True, **options}
        )  # fmt: skip
        trainer = DPOTrainer(
            str(BASE), args=args, train_dataset=train, eval_dataset=test, peft_config=None if lora is None else adapter(lora)
        )
        trainer.train()
        found = trainer.held_out(trainer.eval_groups)
    return {
        "agreement": [pair_agreement(r.tolist(), t.tolist()) for r, t in zip(found.rewards, found.targets, strict=True)],
        "best": [best_of_n(r.tolist(), t.tolist()) for r, t in zip(found.rewards, found.targets, strict=True)],
        "lean": measure(found)["margin_length_correlation"],
        "seconds": time.perf_counter() - start,
    }


def run_trl(seed: int, train: list[Example], test: list[Example]) -> dict[str, Any]:
    """The same rows, steps, schedule and precision with TRL, its rewards read by `Ranker.from_models`."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.perf_counter()
    rows = []
    for example in train:
        prompt = example.prompt if isinstance(example.prompt, list) else [{"role": "user", "content": example.prompt}]
        chosen, rejected = ([{"role": "assistant", "content": c.text}] for c in example.candidates)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    policy, reference = (AutoModelForCausalLM.from_pretrained(BASE, dtype="float32") for _ in range(2))
    with tempfile.TemporaryDirectory() as scratch:
        args = trl.DPOConfig(
            scratch, num_train_epochs=1, learning_rate=5e-5, lr_scheduler_type="cosine", warmup_steps=0.1, save_strategy="no", bf16=True,
            max_length=None, per_device_train_batch_size=8, gradient_checkpointing=False, seed=seed, disable_tqdm=True, report_to="none",
            use_cpu=True,
        )  # fmt: skip
        trl.DPOTrainer(policy, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    ranker = Ranker.from_models(policy.float().eval(), reference.eval(), tokenizer=tokenizer, boundary="joint")
    scores = score_examples(ranker, test)
    return {
        "agreement": [pair_agreement(s, example.scores or ()) for s, example in zip(scores, test, strict=True)],
        "lean": length_controlled(test, scores).correlation,
        "seconds": time.perf_counter() - start,
    }


def table(results: dict[str, Any]) -> str:
    """Agreement, and the paired difference to the first line, as Markdown; of lists also the label of the answer ranked first."""
    lines = []
    for kind, entries in results.items():
        default = next(iter(KINDS[kind][1]))
        best = kind == "lists"
        extra = " label of the first (95 %) | difference (95 %) |" if best else ""
        lines += [
            f"### {kind}",
            "",
            f"| | agreement (95 %) | difference to the first line (95 %) |{extra} lean on length | seconds a run |",
            "|---|---|---|---|---|" + ("---|---|" if best else ""),
        ]
        for name, seeds in entries.items():
            cells = compared(seeds, entries[default], "agreement", name == default)
            if best:
                cells += compared(seeds, entries[default], "best", name == default)
            lean, seconds = (np.mean([entry[key] for entry in seeds.values()]) for key in ("lean", "seconds"))
            lines.append(f"| {name} ({len(seeds)} seeds) | {' | '.join(cells)} | {lean:.2f} | {seconds:.0f} |")
        lines.append("")
    return "\n".join(lines)


def compared(seeds: dict[str, Any], defaults: dict[str, Any], key: str, is_default: bool) -> list[str]:
    """The mean over seeds of a figure, and of its paired difference to the default's on the same seeds."""
    shared = [seed for seed in seeds if key in seeds[seed] and key in defaults.get(seed, {})]
    if not shared:
        return ["", ""]
    mean = figure(np.mean([seeds[seed][key] for seed in shared], axis=0))
    gap = figure(np.mean([np.array(seeds[seed][key]) - np.array(defaults[seed][key]) for seed in shared], axis=0))
    return [str(mean), "" if is_default else f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses and settings, side by side.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DPO_RANK_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=800, help="rows to train on")
    parser.add_argument("--width", type=int, default=8, help="candidates of a list")
    parser.add_argument("--only", default="", help="only names that hold this text")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    path = args.output / "losses.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    source, entries = KINDS[args.kind]
    train, test = (rows_of(args.data, source, side, limit, args.width) for side, limit in (("train", args.rows), ("test", 10_000)))
    for seed in range(args.seeds):
        for name, settings in entries.items():
            done = results.setdefault(args.kind, {}).setdefault(name, {})
            if args.only in name and str(seed) not in done:
                Console().print(f"[dim]{args.kind}: {name}, seed {seed}[/]")
                done[str(seed)] = run(settings, seed, train, test)
                path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    (args.output / "losses.md").write_text(table(results), encoding="utf-8")
    Console().print(table(results), markup=False, highlight=False)


if __name__ == "__main__":
    main()

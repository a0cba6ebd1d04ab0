"""How fast a policy trains, and in how much memory, side by side with TRL's DPOTrainer: same model, rows, steps and precision.

    python benchmarks/training.py --data $DPO_RANK_DATA                       # every case; goes on where it stopped
    python benchmarks/training.py --data $DPO_RANK_DATA --cases "15M pairs"   # those whose name holds the text

Run on an otherwise idle machine. Every way runs in a process of its own. ``TRL, its defaults`` has gradient checkpointing on, as TRL has;
``TRL, best on a CPU`` has it off and rows of like length together (padding-free needs FlashAttention there). Writes
docs/results/training.json and .md.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

HERE = Path(__file__).parent
BATCH = 8
OURS, DEFAULTS, BEST = "dpo_rank", "TRL, its defaults", "TRL, best on a CPU"
CASES: dict[str, dict[str, Any]] = {
    "15M pairs fp32": {"shape": "15M", "steps": 6},
    "15M pairs bf16": {"shape": "15M", "steps": 6, "bf16": True},
    "15M pairs fp32, reference computed before": {"shape": "15M", "steps": 6, "precomputed": True},
    "15M pairs bf16, reference computed before": {"shape": "15M", "steps": 6, "bf16": True, "precomputed": True},
    "15M lists of 8 fp32": {"shape": "15M", "steps": 2, "lists": 8},
    "134M pairs bf16": {"shape": "134M", "steps": 2, "bf16": True},
    "134M pairs fp32": {"shape": "134M", "steps": 2},
    "134M pairs fp32, reference computed before": {"shape": "134M", "steps": 2, "precomputed": True},
}


def rows_of(case: dict[str, Any], data: Path) -> list[dict[str, Any]]:
    """Pairs of hh_harmless.train, or lists of alpacaeval_16.train; as many as the steps read, one step of warm-up before."""
    if "lists" not in case:
        with gzip.open(data / "hh_harmless.train.jsonl.gz", "rt") as lines:
            found = [json.loads(line) for line in itertools.islice(lines, BATCH * (case["steps"] + 1))]
        return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in found]
    with gzip.open(data / "alpacaeval_16.train.jsonl.gz", "rt") as lines:
        found = [json.loads(line) for line in lines]
    size = case["lists"]
    kept = [row for row in found if len(row["completions"]) >= size and len(set(row["scores"][:size])) > 1][: 2 * (case["steps"] + 1)]
    return [{"prompt": row["prompt"], "completions": row["completions"][:size], "scores": row["scores"][:size]} for row in kept]


def all_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every untied pair of every list, in TRL's conversational form."""

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["completions"][a]),
            "rejected": turn("assistant", row["completions"][b]),
        }
        for row in rows
        for a, b in itertools.permutations(range(len(row["scores"])), 2)
        if row["scores"][a] > row["scores"][b]
    ]


def run(way: str, case: dict[str, Any], data: Path, threads: int) -> dict[str, Any]:
    """One way in this process: seconds of each step after the first, peak memory, losses."""
    import torch
    from shapes import config
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    if way == OURS:
        from dpo_rank.training import DPOConfig, DPOTrainer
    else:
        import trl
        from datasets import Dataset
        from trl import DPOTrainer as _  # noqa: F401  # loaded before memory is measured
    torch.set_num_threads(threads)
    rows = rows_of(case, data)
    tokenizer = AutoTokenizer.from_pretrained(HERE.parent / "models" / "starter-base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(case["shape"]))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = memory("VmRSS") - weights
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        common: dict[str, Any] = {
            "output_dir": scratch,
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "bf16": case.get("bf16", False),
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 1e-5,
            "disable_tqdm": True,
            "precompute_ref_log_probs": case.get("precomputed", False),
        }
        units = len(rows) / (case["steps"] + 1)
        if way == OURS:
            if "lists" in case:
                common["per_device_train_batch_size"] = int(units)
            trainer: Any = DPOTrainer(model, None, DPOConfig(**common), train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()])
        else:
            if way == BEST:
                common |= {"gradient_checkpointing": False, **grouped(), "length_column_name": "tokens", "remove_unused_columns": False}
            pairs = all_pairs(rows) if "lists" in case else rows
            if "lists" in case:  # pairs of whole lists: the steps are counted in lists
                units = len(rows) / (-(-len(pairs) // BATCH))
            torch.manual_seed(0)
            reference = AutoModelForCausalLM.from_config(config(case["shape"]))
            dataset = Dataset.from_list(pairs)
            args = trl.DPOConfig(**common, max_length=None)
            trainer = trl.DPOTrainer(model, reference, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()])
            if way == BEST:
                ids = [name for name in trainer.train_dataset.column_names if name.endswith("_ids")]
                lengths = [sum(len(row[name]) for name in ids) for row in trainer.train_dataset]
                trainer.train_dataset = trainer.train_dataset.add_column("tokens", lengths)
        trainer.train()
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    optimizer_and_gradients = 3 * weights
    held = weights * (1 if case.get("precomputed") and way == OURS else 2) + optimizer_and_gradients
    return {
        "seconds_a_step": steps,
        "units_a_step": units,
        "before_first_step": stamps[0] - started,
        "peak_mib": round(memory("VmHWM") / 2**20),
        "above_state_mib": round((memory("VmHWM") - before - held) / 2**20),
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }


def grouped() -> dict[str, Any]:
    """Rows of like length together, as this transformers calls it."""
    import transformers

    return {"group_by_length": True} if transformers.__version__.startswith("4.") else {"train_sampling_strategy": "group_by_length"}


def memory(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now or ``VmHWM`` at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def speed(entry: dict[str, Any]) -> float:
    """Rows (or lists) a second, over all steps after the first: their lengths differ."""
    return float(entry["units_a_step"] * len(entry["seconds_a_step"]) / sum(entry["seconds_a_step"]))


def table(results: dict[str, Any]) -> str:
    """Every measured case as Markdown."""
    lines = [
        "| case | way | rows or lists/s | x TRL's defaults | x TRL's best | peak MiB | above weights, gradients and optimizer, MiB | share of TRL's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, ways in results.items():
        for way, entry in ways.items():
            if "not_run" in entry:
                lines.append(f"| {case} | {way} | not run: {entry['not_run']} | | | | | |")
                continue
            ratios = [f"{speed(entry) / speed(ways[other]):.2f}" if "losses" in ways.get(other, {}) else "" for other in (DEFAULTS, BEST)]
            others = [ways[other]["above_state_mib"] for other in (DEFAULTS, BEST) if "losses" in ways.get(other, {})]
            share = f"{entry['above_state_mib'] / min(others):.2f}" if way == OURS and others else ""
            lines.append(
                f"| {case} | {way} | {speed(entry):.3f} | {ratios[0]} | {ratios[1]} | {entry['peak_mib']} | {entry['above_state_mib']} | {share} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        request = json.loads(sys.argv[1])
        found = run(request["way"], request["case"], Path(request["data"]), request["threads"])
        sys.stdout.write(json.dumps(found) + "\n")
        return
    parser = argparse.ArgumentParser(description="Training beside TRL's DPOTrainer.")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DPO_RANK_DATA", "../shared/data")))
    parser.add_argument("--cases", default="", help="only cases whose name holds this text")
    parser.add_argument("--ways", default="", help="only ways whose name holds this text")
    parser.add_argument("--again", action="store_true", help="measure again what the results hold already")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    path = args.output / "training.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name, case in CASES.items():
        if args.cases not in name:
            continue
        for way in (OURS, BEST, DEFAULTS):
            if args.ways not in way or (way in results.get(name, {}) and not args.again):
                continue
            Console().print(f"[dim]{name}: {way}[/]")
            request = {"way": way, "case": case, "data": str(args.data), "threads": args.threads}
            done = subprocess.run([sys.executable, __file__, json.dumps(request)], capture_output=True, text=True, check=False)
            failed = {"not_run": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}
            results.setdefault(name, {})[way] = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / "training.md").write_text(table(results), encoding="utf-8")
    Console().print(table(results), markup=False, highlight=False)


if __name__ == "__main__":
    main()

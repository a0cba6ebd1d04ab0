"""The texts the starter is made of, read from a folder of jsonl.gz files or from the public datasets they come from.

| source                  | licence | public dataset               | used for                                     |
|-------------------------|---------|------------------------------|----------------------------------------------|
| hh_harmless.train       | MIT     | Anthropic/hh-rlhf (harmless) | language modelling, human pairs, damage      |
| gsm8k.sft               | MIT     | openai/gsm8k                 | language modelling, whole answers to damage  |
| halueval_general.sft    | MIT     | pminervini/HaluEval          | language modelling, whole answers to damage  |
| halueval_qa.train       | MIT     | pminervini/HaluEval          | answers over passages                        |

Files named ``.test`` are never opened here.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FILES = ("hh_harmless.train", "gsm8k.sft", "halueval_general.sft", "halueval_qa.train")


def data_folder() -> Path:
    """The folder of the four files: ``DPO_RANK_DATA``, else ``../shared/data``."""
    return Path(os.environ.get("DPO_RANK_DATA", "../shared/data"))


def load(folder: Path | None = None) -> dict[str, list[Row]]:
    """All rows by file name, from ``folder`` or, with ``folder=Path("hub")``, from the public datasets."""
    if folder is not None and str(folder) == "hub":
        return _from_hub()
    root = folder or data_folder()
    rows: dict[str, list[Row]] = {}
    for name in FILES:
        with gzip.open(root / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows[name] = [json.loads(line) for line in lines]
    return rows


def _from_hub() -> dict[str, list[Row]]:
    """The same kinds of rows from the Hugging Face hub (more of them: the files above are a sample)."""
    from datasets import load_dataset

    harmless = load_dataset("Anthropic/hh-rlhf", data_dir="harmless-base", split="train")
    gsm8k = load_dataset("openai/gsm8k", "main", split="train")
    general = load_dataset("pminervini/HaluEval", "general", split="data")
    qa = load_dataset("pminervini/HaluEval", "qa", split="data")
    return {
        "hh_harmless.train": [_hh_pair(row) for row in harmless],
        "gsm8k.sft": [{"prompt": row["question"], "completion": row["answer"]} for row in gsm8k],
        "halueval_general.sft": [
            {"prompt": row["user_query"], "completion": row["chatgpt_response"]} for row in general if row["hallucination"] == "no"
        ],
        "halueval_qa.train": [
            {
                "prompt": row["question"],
                "passages": [{"text": row["knowledge"]}],
                "completions": [row["right_answer"], row["hallucinated_answer"]],
                "scores": [1.0, 0.0],
            }
            for row in qa
        ],
    }


def _hh_pair(row: Row) -> Row:
    """``\\n\\nHuman: ...\\n\\nAssistant: ...`` transcripts as chat turns; the last answer is the completion."""
    chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _turns(transcript: str) -> list[dict[str, str]]:
    turns = []
    for part in transcript.split("\n\nHuman: ")[1:]:
        user, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": user.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns

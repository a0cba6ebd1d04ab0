"""The starter's recipe runs on small made-up data in the files' formats."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dpo_rank import Ranker
from dpo_rank.data.formats import held_out, read
from dpo_rank.data.synthetic import WORDS, instructions

pytestmark = pytest.mark.models
STARTER = Path(__file__).parents[1] / "examples" / "starter"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made = list(instructions(120))
    story = " ".join(f"The {a} stands near the {b}." for a, b in itertools.pairwise(WORDS))
    sft = [{"prompt": i.prompt, "completion": f"{answers[0]} {story[n : n + 300]}"} for n, (i, answers) in enumerate(made)]
    turns = [[{"role": "assistant", "content": text}] for text in ("A fine answer.", "A bad answer.")]
    files = {
        "hh_harmless.train": [
            {"prompt": [{"role": "user", "content": i.prompt}], "chosen": turns[0], "rejected": turns[1]} for i, _ in made
        ],
        "gsm8k.sft": [{**row, "completion": row["completion"] + "\n#### 4"} for row in sft],
        "halueval_general.sft": sft,
        "halueval_qa.train": [
            {"prompt": i.prompt, "passages": [{"text": story[:90]}], "completions": [f"Answer {n}.", "No."], "scores": [1.0, 0.0]}
            for n, (i, _) in enumerate(made)
        ],
    }
    for name, rows in files.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def run(script, *arguments):
    done = subprocess.run([sys.executable, str(STARTER / script), *map(str, arguments)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_are_made_and_split_by_prompt(data, tmp_path):
    run("rows.py", "--data", data, "--output", tmp_path, "--damaged", 300, "--held-out-damaged", 70, "--short", 0.5)
    train, held = (list(read(tmp_path / f"{name}.jsonl")) for name in ("train", "held_out"))
    assert not [row for row in train if held_out(row.prompt)]
    assert all(held_out(row.prompt) for row in held)
    kinds = {"cut off", "looping", "answer to another prompt", "shuffled", "prompt echoed", "needless refusal", "garbled"}
    assert kinds | {"human: harmless", "answer over passages"} == {row.raw["subset"] for row in train}
    damaged = [row for row in held if row.raw["subset"] in kinds]
    assert len(damaged) == 70
    assert all(row.candidates[0].text != row.candidates[1].text for row in damaged)


def test_a_base_is_trained(data, tmp_path):
    out = run("base.py", "--data", data, "--output", tmp_path / "base", "--epochs", 1, "--no-bf16")
    assert "parameters" in out
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert (tmp_path / "base" / "tokenizer.json").is_file()
    out = run(
        "base.py", "--data", data, "--start", tmp_path / "base", "--copies", 0.5, "--epochs", 1, "--output", tmp_path / "more", "--no-bf16"
    )
    assert "read a second time" in out
    assert (tmp_path / "more" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_checkpoints_are_averaged(data, tmp_path, tiny_artifact):
    """The mean of a policy and its mirror image about the reference is the reference: every reward is 0."""
    run("rows.py", "--data", data, "--output", tmp_path, "--damaged", 10, "--held-out-damaged", 21)
    policy, reference = (load_file(tiny_artifact / name / "model.safetensors") for name in ("policy", "reference"))
    for name, weights in (("one", policy), ("other", {key: 2 * reference[key] - value for key, value in policy.items()})):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    ways = ("--held-out", tmp_path / "held_out.jsonl", "--output", tmp_path / "mean")
    run("average.py", "--ranker", tiny_artifact, "--checkpoints", tmp_path / "one", tmp_path / "other", *ways)
    texts = ["An answer.", "No answer at all."]
    assert Ranker.load(tmp_path / "mean", precision="fp32").score("A question?", texts) == pytest.approx([0.0, 0.0], abs=1e-4)
    assert max(abs(Ranker.load(tiny_artifact, precision="fp32").score("A question?", texts))) > 1e-2


def test_the_starter_is_finished_from_a_ranker(data, tmp_path, tiny_artifact):
    run("rows.py", "--data", data, "--output", tmp_path, "--damaged", 10, "--held-out-damaged", 21)
    held = tmp_path / "held_out.jsonl"
    run("finish.py", "--ranker", tiny_artifact, "--held-out", held, "--public", held, "--output", tmp_path / "starter")
    made = Ranker.load(tmp_path / "starter")
    assert (made.name, made.precision, made.calibrated) == ("starter", "int8", True)
    card = (tmp_path / "starter" / "README.md").read_text(encoding="utf-8")
    assert "needless refusal" in card
    assert "**On held_out:**" in card

"""The embedded starter: what it can tell apart, and what it costs."""

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_rank import Ranker
from dpo_rank.loading import STARTER

WHOLE = "Blot it with a cloth, cover it with salt, wait ten minutes, rinse with cold water and wash the shirt as usual."
PROMPT = "How do I get a red wine stain out of a cotton shirt?"
DATA = Path(os.environ.get("DPO_RANK_DATA", "../shared/data"))


@pytest.fixture(scope="module")
def starter():
    return Ranker.load("starter")


def test_it_is_small():
    assert sum(path.stat().st_size for path in STARTER.rglob("*") if path.is_file()) <= 14 * 2**20
    base = STARTER.parents[1] / "models" / "starter-base" / "model.safetensors"
    assert base.stat().st_size <= 12 * 2**20


@pytest.mark.parametrize(
    "broken",
    [
        "cloth a it Blot with, salt it cover with, minutes wait ten, water cold rinse with and usual as wash shirt the.",
        "Blot it with a cloth a cloth a cloth a cloth a cloth a cloth a cloth a cloth a cloth a cloth a cloth a cloth.",
        "Bl#t i? wi~h a cl@th, c%ver *t wi)h s=lt, w+it t&n m]nutes, r!nse w{th c}ld w;ter a<d w>sh t/e sh|rt a$ us^al.",
        "I'm sorry, but I can't help with that.",
    ],
)
def test_it_tells_broken_answers_from_whole_ones(starter, broken):
    assert starter.rank(PROMPT, [broken, WHOLE]).best.index == 1


def test_its_order_comes_from_the_weights(starter):
    swapped = starter.score("What is the capital of Australia?", [WHOLE, "The capital of Australia is Canberra."])
    assert swapped[1] > swapped[0]
    assert starter.score(PROMPT, [WHOLE])[0] != starter.score("What is the capital of Australia?", [WHOLE])[0]


def test_it_says_once_a_process_what_it_is(caplog):
    from dpo_rank.loading import say_what_the_starter_is

    say_what_the_starter_is.cache_clear()
    with caplog.at_level(logging.WARNING):
        Ranker.load("starter")
        assert not caplog.records
        Ranker.load()
        Ranker.load()
    assert len(caplog.records) == 1
    assert "broken answers" in caplog.text


def test_it_reads_passages(starter):
    passages = ["Aldern is a town of nine thousand people on the river Wenlow."]
    ranking = starter.rank("Which river runs through Aldern?", ["The river Wenlow.", "Nine."], passages=passages)
    assert sorted(ranking.order) == [0, 1]
    assert starter.manifest.passage_format is not None


def test_its_card_holds_measured_figures():
    card = (STARTER / "README.md").read_text(encoding="utf-8")
    held_out = json.loads((STARTER / "dpo_rank.json").read_text(encoding="utf-8"))["training"]["held_out"]
    for kind in ("cut off", "looping", "answer to another prompt", "shuffled", "prompt echoed", "needless refusal", "garbled"):
        assert f"| {kind} |" in card
        assert held_out[kind]["num_prompts"] >= 30


def test_first_ranking_in_a_fresh_process_needs_no_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from dpo_rank import Ranker\n"
        "print(Ranker.load('starter').rank('hi', ['Hello! How can I help you today?', 'Hello hello hello hello hello hello hello hello']).best.index)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "0"


@pytest.mark.skipif(not (DATA / "hh_harmless.test.jsonl.gz").is_file(), reason="the preference data is not here (DPO_RANK_DATA)")
def test_a_score_on_real_pairs_does_not_depend_on_the_batch(starter):
    with gzip.open(DATA / "hh_harmless.test.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(12), strict=False)]
    prompts = [row["prompt"] for row in rows]
    answers = [[row["chosen"][0]["content"], row["rejected"][0]["content"]] for row in rows]
    together = starter.score_many(prompts, answers)
    alone = [np.concatenate([starter.score(p, [a]) for a in pair]) for p, pair in zip(prompts, answers, strict=True)]
    assert np.abs(np.concatenate(together) - np.concatenate(alone)).max() < 0.05

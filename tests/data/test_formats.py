"""Row formats: what is read, and how what is bad is named."""

import gzip
import json

import pytest

from dpo_rank import Candidate, DataError
from dpo_rank.data.formats import JsonLines, Problems, held_out, parse, prompt_hash, read
from dpo_rank.data.synthetic import instructions, lists, pairs

USER = [{"role": "user", "content": "hi"}]
ASSISTANT = {"role": "assistant", "content": "yes"}

GOOD = {
    "pair": ({"prompt": "a", "chosen": " b", "rejected": " c"}, "a", [" b", " c"], (1, 0)),
    "pair of messages": (
        {"prompt": USER, "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "no"}]},
        USER,
        ["yes", "no"],
        (1, 0),
    ),
    "implicit prompt, text": ({"chosen": "sky is blue", "rejected": "sky is green"}, "sky is", [" blue", " green"], (1, 0)),
    "implicit prompt, messages": (
        {"chosen": [*USER, ASSISTANT], "rejected": [*USER, {**ASSISTANT, "content": "no"}]},
        USER,
        ["yes", "no"],
        (1, 0),
    ),
    "text prompt, whole conversations": (
        {"prompt": "hi", "chosen": [*USER, ASSISTANT], "rejected": [*USER, {**ASSISTANT, "content": "no"}]},
        USER,
        ["yes", "no"],
        (1, 0),
    ),
    "list with scores": ({"prompt": "a", "completions": ["x", "y", "z"], "scores": [0.1, 3, 0.1]}, "a", ["x", "y", "z"], (0.1, 3, 0.1)),
    "list with ranks": ({"prompt": "a", "completions": ["x", "y"], "ranks": [2, 1]}, "a", ["x", "y"], (-2, -1)),
    "reranking": ({"query": "q", "positive": "p", "negative": ["n", "m"]}, "q", ["p", "n", "m"], (1, 0, 0)),
    "parts": (
        {"prompt": "a", "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}], "rejected": [ASSISTANT]},
        "a",
        ["b", "yes"],
        (1, 0),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_formats(name):
    row, prompt, texts, scores = GOOD[name]
    example = parse(row)
    assert example.prompt == prompt
    assert [candidate.text for candidate in example.candidates] == texts
    assert example.scores == scores
    assert example.raw == row


def test_implicit_prompts_are_split_as_trl_splits_them():
    trl = pytest.importorskip("trl", reason="the dev extra installs trl")
    for row in (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "ab cd", "rejected": "ab ce"},
        {"chosen": "xa", "rejected": "xb"},
    ):
        theirs, ours = trl.extract_prompt(row), parse(row)
        assert (ours.prompt, *(c.text for c in ours.candidates)) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_candidate_mappings_and_passages():
    example = parse(
        {"prompt": "a", "completions": [{"text": "x", "id": 3, "finished": False, "model": "m"}, "y"], "passages": ["p", {"text": "q"}]},
        labelled=False,
    )
    assert example.candidates[0] == Candidate("x", id="3", finished=False, metadata={"model": "m"})
    assert example.passages == ("p", {"text": "q"})
    assert example.scores is None
    assert example.pairs() == []


BAD = {
    "a list": ([], "expected an object"),
    "a text": ("x", "expected an object"),
    "no fields": ({}, "a row has 'chosen' and 'rejected'"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "'rejected': is missing"),
    "prompt is a number": ({"prompt": 1, "chosen": "b", "rejected": "c"}, "'prompt': expected a text"),
    "prompt is empty": ({"prompt": [], "chosen": "b", "rejected": "c"}, "'prompt'"),
    "message without role": ({"prompt": [{"content": "x"}], "chosen": "b", "rejected": "c"}, "'prompt': message 0"),
    "chosen is null": ({"prompt": "a", "chosen": None, "rejected": "c"}, "'chosen': expected"),
    "mixed": ({"prompt": "a", "chosen": "b", "rejected": [ASSISTANT]}, "one is a conversation"),
    "user turn as answer": ({"prompt": "a", "chosen": USER, "rejected": [ASSISTANT]}, "candidate 0: is a turn of 'user'"),
    "several turns as answer": (
        {"prompt": USER, "chosen": [ASSISTANT, *USER], "rejected": [{**ASSISTANT, "content": "n"}, *USER]},
        "has 2 turns",
    ),
    "nothing shared": ({"chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "no"}]}, "'prompt': is missing"),
    "completions are a text": ({"prompt": "a", "completions": "x", "scores": [1]}, "'completions': expected a list"),
    "completions are empty": ({"prompt": "a", "completions": [], "scores": []}, "'completions': is empty"),
    "no scores": ({"prompt": "a", "completions": ["x"]}, "'scores' (or 'ranks'): is missing"),
    "too few scores": ({"prompt": "a", "completions": ["x", "y"], "scores": [1]}, "'scores': expected 2 numbers"),
    "a score is a text": ({"prompt": "a", "completions": ["x", "y"], "scores": [1, "2"]}, "'scores': item 1 is '2'"),
    "a score is NaN": ({"prompt": "a", "completions": ["x", "y"], "scores": [1, float("nan")]}, "'scores': item 1 is nan"),
    "a score is true": ({"prompt": "a", "completions": ["x", "y"], "scores": [1, True]}, "item 1 is True"),
    "a candidate is a number": ({"prompt": "a", "completions": ["x", 5], "scores": [1, 2]}, "candidate 1: expected a str"),
    "passages are a text": ({"prompt": "a", "chosen": "b", "rejected": "c", "passages": "p"}, "'passages': expected a list"),
    "no negative": ({"query": "q", "positive": "p"}, "'positive' and 'negative'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name, tmp_path):
    row, words = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD["pair"][0]) + "\n\n" + json.dumps(row) + "\n" + json.dumps(GOOD["pair"][0]) + "\n")
    with pytest.raises(DataError) as caught:
        list(read(path))
    assert f"{path}:3: " in str(caught.value)
    assert words in str(caught.value)
    problems = Problems()
    assert len(list(read(path, on_error="skip", problems=problems))) == 2
    assert len(problems) == 1
    assert f"{path}:3: " in str(problems)


def test_every_file_format_gives_the_same_rows(tmp_path):
    rows = list(lists(5))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    sources = [tmp_path / "a.jsonl", str(tmp_path / "a.jsonl.gz"), rows, JsonLines(text.splitlines(), "stdin")]
    try:
        import datasets
    except ImportError:
        pass
    else:
        dataset = datasets.Dataset.from_list(rows)
        dataset.to_parquet(str(tmp_path / "a.parquet"))
        sources += [dataset, tmp_path / "a.parquet"]
    expected = [(example.prompt, example.candidates, example.scores) for example in map(parse, rows)]
    for source in sources:
        assert [(e.prompt, e.candidates, e.scores) for e in read(source)] == expected


@pytest.mark.parametrize("content", [b"{not json}\n", b"\xff\xfe\n", b"[" * 50_000 + b"\n"])
def test_lines_that_are_no_json_are_named(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        list(read(tmp_path / "a.jsonl"))


def test_a_damaged_gzip_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 999)[:-30])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: cannot be read"):
        list(read(tmp_path / "a.jsonl.gz"))


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a directory"):
        list(read(tmp_path))


def test_the_split_is_by_prompt():
    texts = [f"prompt {n}" for n in range(4000)]
    share = sum(held_out(text, 0.05) for text in texts) / len(texts)
    assert 0.04 < share < 0.06
    assert all(prompt_hash(text) == prompt_hash([{"role": "user", "content": text}]) for text in texts[:50])


def test_synthetic_labels_are_exact():
    for instruction, answers in instructions(50):
        scores = sorted((instruction.score(answer) for answer in answers), reverse=True)
        assert scores[0] == 1.0
        assert all(score == 0.75 for score in scores[1:])
    for row in pairs(20):
        assert row["chosen"] != row["rejected"]
    assert list(lists(5)) == list(lists(5))

"""The command line, as a user runs it."""

import json
import subprocess
import sys

import pytest

from dpo_rank import Ranker
from dpo_rank.data.synthetic import lists, pairs
from tests.cases import ANSWERS, PROMPT

pytestmark = pytest.mark.models
RANKING = ("rank", "score", "evaluate", "calibrate", "bench", "info")


@pytest.fixture(scope="module")
def cli(tiny_artifact):
    """Runs a command in this process with the tiny ranker as the default; gives exit code, stdout and stderr."""
    import contextlib
    import io

    from rich.console import Console

    from dpo_rank import cli as module

    def run(*arguments, stdin="", ranker=tiny_artifact):
        out, err = io.StringIO(), io.StringIO()
        patch = pytest.MonkeyPatch()
        extra = ["--ranker", str(ranker)] if ranker and arguments[0] in RANKING else []
        patch.setattr(sys, "argv", ["dpo-rank", *map(str, arguments), *extra])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(module, "errors", Console(file=err, width=300))
        patch.setattr(module, "screen", Console(file=out, width=300))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                module.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            patch.undo()
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "note": i}) + "\n" for i, row in enumerate(lists(70))))
    return path


def test_rank_shows_a_table(cli):
    code, out, _ = cli("rank", PROMPT, *ANSWERS)
    assert code == 0
    assert "ranker: tiny (onnx, fp32, cpu)" in out
    assert all(answer in out for answer in ANSWERS)


def test_rank_json(cli, tiny_artifact):
    code, out, _ = cli("rank", PROMPT, *ANSWERS, "--json", "--top-k", 2)
    found = json.loads(out)
    assert code == 0
    assert found["order"] == Ranker.load(tiny_artifact).rank(PROMPT, ANSWERS).order[:2]
    assert found["ranker"] == "tiny"


def test_score_keeps_the_order_of_the_answers(cli, tiny_artifact):
    _, out, _ = cli("score", PROMPT, *ANSWERS, "--json")
    assert json.loads(out)["scores"] == pytest.approx(Ranker.load(tiny_artifact).score(PROMPT, ANSWERS).tolist())
    _, out, _ = cli("score", PROMPT, *ANSWERS)
    places = [out.index(answer) for answer in ANSWERS]
    assert places == sorted(places)


def test_rows_go_in_and_come_out_with_a_ranking(cli, rows, tmp_path, tiny_artifact):
    code, _, _ = cli("rank", "--input", rows, "--output", tmp_path / "out.jsonl")
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 0
    assert [row["note"] for row in made] == list(range(70))
    ranking = Ranker.load(tiny_artifact).rank(made[3]["prompt"], made[3]["completions"])
    entry = made[3]["ranking"]
    assert sorted(entry) == ["order", "probabilities", "ranker", "scores", "truncated"]
    assert entry["order"] == ranking.order
    assert entry["scores"][ranking.order[0]] == pytest.approx(ranking.best.score, abs=1e-5)
    code, out, _ = cli("rank", "--input", "-", stdin=rows.read_text().splitlines()[0])
    assert json.loads(out)["ranking"]["order"] == made[0]["ranking"]["order"]


def test_bad_rows_stop_or_are_skipped_and_nothing_is_lost(cli, rows, tmp_path):
    text = rows.read_text().splitlines()
    text[5] = "{broken"
    text[40] = json.dumps({"prompt": [{"role": "wizard", "content": "x"}], "completions": ["a"], "note": 40})
    rows.write_text("\n".join(text))
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    code, _, err = cli("rank", "--input", rows, "--output", out)
    assert code == 2
    assert "rows.jsonl:6" in err
    assert out.read_text() == "precious"
    code, _, err = cli("rank", "--input", rows, "--output", out, "--on-error", "skip")
    assert code == 0
    assert len(out.read_text().splitlines()) == 68
    assert "2 bad row(s) skipped" in err
    assert "rows.jsonl:41" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_evaluate_a_ranker_and_given_rankings_alike(cli, rows, tmp_path):
    code, out, _ = cli("evaluate", "--data", rows)
    assert code == 0
    for name in ("tiny", "longest", "shortest", "random"):
        assert name in out
    cli("rank", "--input", rows, "--output", tmp_path / "ranked.jsonl")
    _, direct, _ = cli("evaluate", "--data", rows, "--json")
    _, given, _ = cli("evaluate", "--data", rows, "--rankings", tmp_path / "ranked.jsonl", "--json")
    direct, given = json.loads(direct)["reports"][0], json.loads(given)["reports"][0]
    assert direct == given
    assert direct["name"] == "tiny"
    assert direct["best_of_n"]["num_prompts"] == 70


def test_calibrate_writes_a_ranker(cli, rows, tmp_path):
    code, out, _ = cli("calibrate", "--data", rows, "--output", tmp_path / "calibrated")
    assert code == 0
    assert "temperature" in out
    assert Ranker.load(tmp_path / "calibrated").calibrated


def test_info(cli):
    code, out, _ = cli("info", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ranker"]["precisions"] == ["fp32", "int8"]
    assert found["packages"]["onnxruntime"]
    assert "temperature" in cli("info")[1]


BAD = {
    "nothing to rank": ["rank"],
    "no answers": ["rank", "prompt"],
    "unknown engine": ["rank", "p", "a", "--engine", "magic"],
    "unknown device": ["rank", "p", "a", "--device", "abacus"],
    "unknown precision": ["rank", "p", "a", "--precision", "int3"],
    "no threads": ["rank", "p", "a", "--threads", "0"],
    "negative top-k": ["rank", "p", "a", "--top-k", "-1"],
    "no such input": ["rank", "--input", "/no/such/rows.jsonl"],
    "input and arguments": ["rank", "p", "a", "--input", "-"],
    "output in no directory": ["rank", "--input", "-", "--output", "/no/such/dir/out.jsonl"],
    "unknown on-error": ["rank", "--input", "-", "--on-error", "shrug"],
    "evaluate without labels": ["evaluate", "--data", "-"],
    "evaluate no such file": ["evaluate", "--data", "/no/such/rows.jsonl"],
    "bench without rows": ["bench", "latency", "--data", "-"],
    "rankings without ranking": ["evaluate", "--data", "x", "--rankings", "-"],
    "calibrate over an existing target": ["calibrate", "--data", "-", "--output", "/tmp"],
    "train without rows": ["train", "--model", "x", "--data", "/no/such/rows.jsonl", "--output", "out"],
    "train with a bad boundary": ["train", "--model", "x", "--data", "x.jsonl", "--output", "out", "--boundary", "fuzzy"],
    "train with a negative beta": ["train", "--model", "x", "--data", "x.jsonl", "--output", "out", "--beta", "-1"],
    "export of no model": ["export", "--policy", "/no/such/model", "--reference", "/no/such/model", "--output", "out"],
    "export with a bad reward": ["export", "--policy", "x", "--reference", "y", "--output", "out", "--reward", "max"],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_commands_end_with_code_2_and_one_line(cli, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdin = json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"}) if "rankings" in name or "calibrate" in name else '{"prompt": "x"}'
    code, out, err = cli(*BAD[name], stdin=stdin)
    assert code == 2
    assert err.startswith("error: ") or "Usage" in err
    assert len(err.strip().splitlines()) == 1 or "Usage" in err
    assert "Traceback" not in err + out
    assert not out
    assert not list(tmp_path.iterdir())


def test_a_missing_ranker_is_one_line(cli):
    code, _, err = cli("rank", "p", "a", "--ranker", "/no/such/ranker", ranker=None)
    assert code == 2
    assert "no such directory" in err


def test_bench_latency(cli, rows):
    code, out, _ = cli("bench", "latency", "--data", rows, "--limit", 3, "--repeats", 2, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["rows"] == 3
    ways = {(report["engine"], report["precision"]): report for report in found["reports"]}
    exact = ways["onnx", "fp32"]
    assert exact["problem"] is None
    assert exact["same_best"] == 1.0
    assert 0 < exact["ms_per_candidate"] <= exact["median_ms"] <= exact["p90_ms"]
    assert exact["tokens_per_second"] > 0
    assert ("onnx", "int8") in ways
    code, out, _ = cli("bench", "latency", "--data", rows, "--limit", 2, "--engine", "onnx", "--precision", "fp32")
    assert code == 0
    assert "median ms" in out
    assert "int8" not in out
    code, _, err = cli("bench", "latency", "--data", rows, "--precision", "int3")
    assert code == 2
    assert "int3" in err


def test_a_refused_export_at_the_end_of_training_names_the_policy_that_was_trained(cli, tmp_path, monkeypatch):
    from tests.artifacts import tiny_pair

    monkeypatch.chdir(tmp_path)
    policy, _, tok = tiny_pair("gpt-neo", max_position_embeddings=256)
    policy.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(24)))
    code, _, err = cli("train", "--model", "model", "--data", "pairs.jsonl", "--output", "ranker", "--evals", "1", ranker=None)
    assert code == 2
    assert "cannot be exported" in err
    [checkpoint] = (tmp_path / "ranker.run" / "dpo").glob("checkpoint-*")
    assert str(checkpoint.relative_to(tmp_path)) in err
    assert (checkpoint / "model.safetensors").is_file()
    assert not (tmp_path / "ranker").exists()


@pytest.mark.parametrize("export", [True, False])
def test_train_then_evaluate_then_rank(cli, tmp_path, export, monkeypatch):
    from tests.artifacts import tiny_pair

    monkeypatch.chdir(tmp_path)
    policy, _, tok = tiny_pair(max_position_embeddings=256)
    policy.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs(60)) + "{bad\n")
    sft = ["--sft"] if export else ["--no-export"]
    common = ["--model", "model", "--data", "pairs.jsonl", "--output", "ranker", "--evals", "2", "--lr", "1e-3", *sft]
    assert cli("train", *common)[0] == 2
    code, out, err = cli("train", *common, "--on-error", "skip")
    assert code == 0, err
    assert "held-out agreement" in out
    assert "1 bad row(s) skipped" in err
    ranker = Ranker.load(tmp_path / "ranker")
    assert ranker.engine == ("onnx" if export else "torch")
    assert ranker.calibrated
    facts = ranker.manifest.training
    assert facts["rows"] + facts["held_out_rows"] == 60
    assert facts["held_out"]["all"]["num_prompts"] == facts["held_out_rows"]
    assert "Held-out agreement" in (tmp_path / "ranker" / "README.md").read_text()
    assert cli("evaluate", "--data", "pairs.jsonl", "--on-error", "skip", "--ranker", "ranker", ranker=None)[0] == 0
    code, _, err = cli("train", *common)
    assert code == 2
    assert "exists already" in err


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "dpo_rank.cli", "--help"], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("rank", "score", "train", "export", "evaluate", "calibrate", "info"):
        assert command in done.stdout

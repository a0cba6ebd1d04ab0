"""Every snippet of the README and the guide runs; every link leads somewhere."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from dpo_rank.data.synthetic import pairs

pytestmark = pytest.mark.models
ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/guide.md", "docs/training.md", "docs/evaluation.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with what the pages mention: rows, a pair that others trained, and a base as small as it gets in the starter's place."""
    from tests.artifacts import tiny_pair

    monkeypatch.chdir(tmp_path)
    for name, seed in (("pairs", 0), ("test", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(80, seed=seed)))
    policy, reference, tok = tiny_pair()
    for place, model in (("path/to/policy", policy), ("path/to/reference", reference), ("models/starter-base", reference)):
        model.save_pretrained(tmp_path / place)
        tok.save_pretrained(tmp_path / place)
    return tmp_path


def command(line, monkeypatch):
    from dpo_rank import cli

    monkeypatch.setattr(sys, "argv", shlex.split(line))
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, line


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page, workplace, monkeypatch, capsys):
    names: dict = {}
    text = (ROOT / page).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S):
        if language == "bash":
            for line in block.splitlines():
                if line.startswith("dpo-rank"):
                    command(line, monkeypatch)
        elif language == "python":
            exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out


def test_the_first_snippet_picks_the_whole_answer(capsys):
    exec(blocks("README.md", "python")[0], {})
    assert capsys.readouterr().out.strip() == "Put the egg in boiling water for seven minutes, then cool it under cold water."


def test_links_lead_somewhere():
    for page in ROOT.glob("*.md"):
        check(page)
    for page in (ROOT / "docs").glob("*.md"):
        check(page)


def check(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_demo_runs(capsys, monkeypatch):
    import runpy

    monkeypatch.chdir(ROOT)
    runpy.run_path("examples/demo.py", run_name="__main__")
    assert "probability" in capsys.readouterr().out


def test_texts_name_no_machine():
    words = ("/wo" + "rk/", "/opt/" + "wheels", "/ro" + "ot/")
    folders = ("dpo_rank", "tests", "examples", "benchmarks", "docs", ".ci", ".github")
    files = [*ROOT.glob("*.*"), ROOT / "Makefile", *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    texts = [path for path in files if path.is_file() and path.suffix in (".md", ".py", ".toml", ".txt", ".yml", ".json", ".svg", "")]
    assert len(texts) > 60
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path

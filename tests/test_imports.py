"""What imports what, and what an import costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dpo_rank"
FOLDERS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
ALLOWED = {
    ("training", "export"): "a run ends in an exported artifact",
    ("training", "evaluation"): "a run reports its held-out agreement",
    ("training", "data"): "it reads rows",
    ("evaluation", "data"): "it reads rows",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_folders_import_scoring_and_no_other_folder_without_a_reason():
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parts[0]
        if folder not in FOLDERS:
            continue
        used = {name.split(".")[1] for name in imports(path) if name.startswith("dpo_rank.")} & FOLDERS
        for other in used - {folder, "scoring"}:
            assert (folder, other) in ALLOWED, f"{path} imports dpo_rank.{other}"
        if folder == "scoring":
            values = {
                name
                for name in imports(path)
                if name.startswith("dpo_rank.") and not name.startswith(("dpo_rank.scoring", "dpo_rank.errors"))
            }
            assert not values, f"{path} imports {values}"


def run(code):
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_import_and_first_ranking_load_no_torch():
    code = (
        "import sys, json; import dpo_rank; first = sorted(m for m in ('torch', 'numpy', 'onnxruntime', 'transformers') if m in sys.modules);"
        "r = dpo_rank.Ranker.load('starter'); r.rank('hello', ['a', 'b']);"
        "print(json.dumps([first, sorted(m for m in ('torch', 'transformers', 'onnx', 'datasets', 'scipy', 'requests') if m in sys.modules)]))"
    )
    assert run(code) == [[], []]


def test_the_package_prints_nothing_and_runs_no_pickle():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not names & {"print", "eval", "exec"}, path
        assert not {"pickle", "joblib", "dill"} & set(imports(path)), path
        attributes = {
            (node.value.id, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert ("torch", "load") not in attributes, path

"""Artifacts on disk: atomic saving, and every kind of damage refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_rank import ArtifactError, Ranker
from dpo_rank import artifact as artifacts

pytestmark = pytest.mark.models
FILES = [
    "README.md",
    "dpo_rank.json",
    "onnx/fp32/policy.onnx",
    "onnx/fp32/policy.onnx.data",
    "onnx/fp32/reference.onnx",
    "onnx/fp32/reference.onnx.data",
    "onnx/int8/policy.onnx",
    "onnx/int8/policy.onnx.data",
    "onnx/int8/reference.onnx",
    "onnx/int8/reference.onnx.data",
    "policy/config.json",
    "policy/model.safetensors",
    "reference/config.json",
    "reference/model.safetensors",
    "tokenizer.json",
]


@pytest.fixture
def copy(tiny_artifact, tmp_path):
    return Path(shutil.copytree(tiny_artifact, tmp_path / "copy"))


def resign(root, change):
    """Rewrite the manifest as an attacker would: changed, and with a matching self_sha256."""
    import hashlib

    data = json.loads((root / "dpo_rank.json").read_text())
    change(data)
    data["self_sha256"] = "0" * 64
    text = json.dumps(data)
    (root / "dpo_rank.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))


def test_the_files_of_an_artifact(tiny_artifact):
    found = sorted(p.relative_to(tiny_artifact).as_posix() for p in tiny_artifact.rglob("*") if p.is_file())
    assert [name for name in found if "generation_config" not in name] == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["one byte", "cut short", "removed", "symbolic link", "emptied", "longer", "a directory"])
def test_damage_is_refused_by_name(copy, name, damage):
    path = copy / name
    data = path.read_bytes()
    if damage == "one byte":
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    elif damage == "cut short":
        path.write_bytes(data[:-1])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "longer":
        path.write_bytes(data + b" ")
    else:
        path.unlink()
        if damage == "symbolic link":
            (copy.parent / "elsewhere").write_bytes(data)
            path.symlink_to(copy.parent / "elsewhere")
        elif damage == "a directory":
            path.mkdir()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        Ranker.load(copy)


def test_a_linked_directory_is_refused(copy):
    (copy / "onnx").rename(copy.parent / "elsewhere")
    (copy / "onnx").symlink_to(copy.parent / "elsewhere")
    with pytest.raises(ArtifactError, match="symbolic link"):
        Ranker.load(copy)


def test_hard_links_and_a_linked_artifact_directory_are_fine(tiny_artifact, tmp_path):
    import os

    shutil.copytree(tiny_artifact, tmp_path / "hard", copy_function=os.link)
    (tmp_path / "soft").symlink_to(tmp_path / "hard")
    assert Ranker.load(tmp_path / "soft").name == "tiny"


def test_a_file_that_is_not_listed_is_never_opened(copy):
    (copy / "onnx" / "fp32" / "extra.onnx").write_text("nothing")
    (copy / "evil.py").write_text("raise SystemExit")
    assert Ranker.load(copy).name == "tiny"
    saved = Ranker.load(copy).save(copy.parent / "again")
    assert not (saved / "evil.py").exists()


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "onnx/../../outside", "a\\b", "c:evil", "onnx//x", "./x", "dpo_rank.json", ""]
)
def test_a_path_that_escapes_is_refused(copy, name):
    resign(copy, lambda data: data["files"].update({name: {"size": 1, "sha256": "0" * 63 + "1"}}))
    with pytest.raises(ArtifactError, match="no plain path inside"):
        Ranker.load(copy)


def test_external_data_outside_the_manifest_is_refused(copy):
    import hashlib

    graph = copy / "onnx/fp32/policy.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"policy.onnx.data", b"../../../passwd_"))

    def sign(data):
        data["files"]["onnx/fp32/policy.onnx"] = {"size": graph.stat().st_size, "sha256": hashlib.sha256(graph.read_bytes()).hexdigest()}

    resign(copy, sign)
    with pytest.raises(ArtifactError, match=r"policy\.onnx: names '\.\./\.\./\.\./passwd_'"):
        Ranker.load(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format_version=2, written_by="dpo_rank 9.1"), "format 2, written by dpo_rank 9.1"),
        (lambda d: d.update(format_version="x"), "format_version is 'x'"),
        (lambda d: d.update(requires=["telepathy"]), "needs telepathy"),
        (lambda d: d.update(beta=-1), "beta"),
        (lambda d: d.pop("beta"), "beta"),
        (lambda d: d.update(temperature=0), "temperature"),
        (lambda d: d.update(reward="product"), "reward"),
        (lambda d: d.update(limits={"max_prompt_tokens": 0, "max_completion_tokens": 5}), "limits"),
        (lambda d: d.update(files=[]), "items"),
        (lambda d: d["prompt_format"].update(string="x"), "prompt_format"),
        (lambda d: d["files"].pop("tokenizer.json"), "tokenizer.json"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(copy, change, words):
    resign(copy, change)
    with pytest.raises(ArtifactError, match=words):
        Ranker.load(copy)


def test_unknown_keys_are_ignored(copy):
    resign(copy, lambda data: data.update(of_a_later_version={"a": 1}))
    assert Ranker.load(copy).name == "tiny"


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "{" * 100_000])
def test_a_manifest_that_is_no_object_is_refused(copy, text):
    (copy / "dpo_rank.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"dpo_rank\.json"):
        Ranker.load(copy)


def test_a_tokenizer_that_is_none_is_refused(copy):
    import hashlib

    (copy / "tokenizer.json").write_text('{"model": 5}')
    digest = hashlib.sha256((copy / "tokenizer.json").read_bytes()).hexdigest()
    resign(copy, lambda data: data["files"].update({"tokenizer.json": {"size": 12, "sha256": digest}}))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Ranker.load(copy)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="no such directory"):
        Ranker.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"has no dpo_rank\.json"):
        Ranker.load(tmp_path)


def test_save_refuses_an_existing_target_and_replaces_it_when_asked(copy, tmp_path):
    ranker = Ranker.load(copy)
    target = ranker.save(tmp_path / "saved")
    with pytest.raises(ArtifactError, match="exists already"):
        ranker.save(target)
    ranker.temperature, ranker.calibrated = 2.5, True
    ranker.save(target, overwrite=True)
    assert (Ranker.load(target).temperature, Ranker.load(target).calibrated) == (2.5, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "saved"]


def test_saving_over_itself_works(copy):
    ranker = Ranker.load(copy)
    ranker.save(copy, overwrite=True)
    assert Ranker.load(copy).score("x", ["y"]) == ranker.score("x", ["y"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_that_fails_changes_nothing(copy, tmp_path, overwrite):
    target = tmp_path / "target"
    if overwrite:
        shutil.copytree(copy, target)
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(root):
        (root / "half").write_text("x")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        artifacts.save(target, Ranker.load(copy).manifest, fail, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    if overwrite:
        assert Ranker.load(target).name == "tiny"


def test_a_manifest_reads_back_as_written(tiny_artifact):
    manifest = artifacts.load(tiny_artifact).manifest
    again = artifacts.read_manifest(artifacts.manifest_bytes(manifest, manifest.files))
    assert again == manifest
    assert replace(again, name="x") != manifest


def test_a_hub_id_is_fetched_as_plain_files(tiny_artifact, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repo_id, *, revision, token, local_dir, local_files_only):
        asked.update(repo_id=repo_id, revision=revision, local_files_only=local_files_only)
        shutil.copytree(tiny_artifact, local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ranker = Ranker.load("someone/ranker", revision="v1", cache_dir=tmp_path)
    assert ranker.name == "tiny"
    assert asked == {"repo_id": "someone/ranker", "revision": "v1", "local_files_only": False}
    with pytest.raises(ArtifactError, match="local_files_only"):
        Ranker.load("someone/other", cache_dir=tmp_path, local_files_only=True)


def test_the_manifest_names_the_default_precision_and_why(tiny_artifact):
    manifest = artifacts.load(tiny_artifact).manifest
    assert manifest.default_precision in manifest.precisions
    assert manifest.default_precision_reason
    both = {"onnx/fp32/policy.onnx": (1, ""), "onnx/int8/policy.onnx": (1, "")}
    chosen = replace(manifest, default_precision="int8", files={**manifest.files, **both})
    assert artifacts.read_manifest(artifacts.manifest_bytes(chosen, chosen.files)).default_precision == "int8"
    older = replace(chosen, default_precision="")
    assert artifacts.read_manifest(artifacts.manifest_bytes(older, older.files)).default_precision == "fp32"
    absent = replace(manifest, default_precision="fp64")
    with pytest.raises(ArtifactError, match="default_precision"):
        artifacts.read_manifest(artifacts.manifest_bytes(absent, absent.files))


def test_auto_takes_the_first_precision_that_was_exported(tiny_artifact, tmp_path):
    ranker = Ranker.load(tiny_artifact, engine="torch")
    path = ranker.export(tmp_path / "both", precisions=("int8", "fp32"))
    assert Ranker.load(path).precision == "int8"
    assert Ranker.load(path, precision="fp32").precision == "fp32"
    assert "default precision | int8" in (path / "README.md").read_text()

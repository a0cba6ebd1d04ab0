"""A run that is killed, refused or stopped goes on as if nothing had happened."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_rank.data.synthetic import pairs
from dpo_rank.errors import TrainingError
from dpo_rank.training import checkpoint
from tests.training.driver import ROWS, make, state_of

pytestmark = pytest.mark.models
SETTINGS = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "disable_dropout": False, "save_total_limit": 100}
STEPS = 12  # 22 rows, 2 a batch, 2 batches a step (the sixth step of an epoch has one batch), 2 epochs
SOAK = int(os.environ.get("DPO_RANK_SOAK", "3"))


def drive(directory, seconds=None, **request):
    """The run in a process of its own, killed (SIGKILL) after ``seconds``."""
    return subprocess.run(
        [sys.executable, "-m", "tests.training.driver", str(directory), json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from start to end, with a checkpoint after every step."""
    directory = tmp_path_factory.mktemp("whole")
    trainer = make(directory, SETTINGS)
    trainer.train()
    assert trainer.state.max_steps == STEPS
    return directory, state_of(trainer)


@pytest.mark.parametrize("step", [1, 3, 6, STEPS - 1, STEPS], ids=["first", "middle of an epoch", "its end", "last but one", "last"])
def test_a_run_goes_on_bit_for_bit(whole, step, tmp_path):
    directory, expected = whole
    trainer = make(tmp_path, SETTINGS)
    trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
    assert state_of(trainer) == expected


def test_dropout_is_on_in_these_runs(whole, tmp_path):
    trainer = make(tmp_path, {**SETTINGS, "disable_dropout": True})
    trainer.train()
    assert state_of(trainer)["weights"] != whole[1]["weights"]


def test_nothing_in_a_checkpoint_is_pickled(whole):
    names = {path.suffix for path in whole[0].rglob("*") if path.is_file()}
    assert names <= {".json", ".jsonl", ".safetensors", ".jinja", ".png", ".txt"}


def other(name):
    settings, rows = dict(SETTINGS), list(pairs(ROWS))
    if name == "data":
        rows[3] = {**rows[3], "chosen": "Something else altogether."}
    elif name == "beta":
        settings["beta"] = 0.2
    elif name == "learning_rate":
        settings["learning_rate"] = 1e-3
    return settings, rows


@pytest.mark.parametrize("name", ["data", "beta", "learning_rate"])
def test_another_run_is_refused_with_the_field(whole, name):
    settings, rows = other(name)
    with pytest.raises(TrainingError, match=f"{name} was"):
        make(whole[0], settings, rows=rows).train(resume_from_checkpoint=str(whole[0] / "checkpoint-3"))


def test_another_base_is_refused(whole):
    trainer = make(whole[0], SETTINGS)
    with torch.no_grad():
        next(trainer.policy.parameters()).add_(1.0)
    trainer._facts = trainer._run_facts(trainer.policy, trainer.args)
    with pytest.raises(TrainingError, match="base was"):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-3"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "rng-0.json", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_by_name(whole, tmp_path, name, damage, caplog):
    for step in (2, 3):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    file = tmp_path / "checkpoint-3" / name
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "changed" else data[:-1])
    assert checkpoint.last_complete(tmp_path) == tmp_path / "checkpoint-2"
    assert name in caplog.text


def test_killed_anywhere_it_goes_on(whole, tmp_path):
    """A write point or a moment, killed again and again until the run gets through; then it must equal the undisturbed one."""
    rng = random.Random(SOAK)
    kills = [(point, 2) for point in checkpoint.WRITE_POINTS]
    rng.shuffle(kills)
    if len(kills) < SOAK:
        kills += [(rng.choice(checkpoint.WRITE_POINTS), rng.randint(1, 2)) for _ in range(SOAK - len(kills))]
    done = 0
    for point, count in kills[:SOAK]:
        result = drive(tmp_path, settings={**SETTINGS, "save_total_limit": 2}, resume=True, die_at=[point, count])
        if result.returncode == 0:  # the run was over before the point was reached again
            assert json.loads(result.stdout.splitlines()[-1])["weights"] == whole[1]["weights"]
            for path in tmp_path.glob("checkpoint-*"):
                shutil.rmtree(path)
            continue
        assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
        done += 1
        for path in checkpoint.complete(tmp_path):
            assert checkpoint.problem(path) is None, (point, path)
        if point not in ("begun",) or count > 1:
            assert checkpoint.last_complete(tmp_path) is not None, point
    assert done >= min(SOAK, 3) - 1
    result = drive(tmp_path, settings={**SETTINGS, "save_total_limit": 2}, resume=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1])["weights"] == whole[1]["weights"]
    assert not list(tmp_path.glob(".checkpoint-*"))
    assert len(checkpoint.complete(tmp_path)) == 2


def test_killed_at_any_moment_it_goes_on(whole, tmp_path):
    rng = random.Random(SOAK)
    kills = 0
    for _ in range(max(1, SOAK // 5)):
        try:
            result = drive(tmp_path, rng.uniform(4, 12), settings={**SETTINGS, "save_total_limit": 2}, resume=True)
        except subprocess.TimeoutExpired:
            kills += 1
            assert all(checkpoint.problem(path) is None for path in checkpoint.complete(tmp_path))
            continue
        assert result.returncode == 0, result.stderr[-2000:]
        assert json.loads(result.stdout.splitlines()[-1])["weights"] == whole[1]["weights"]
        for path in tmp_path.glob("checkpoint-*"):
            shutil.rmtree(path)
    result = drive(tmp_path, settings={**SETTINGS, "save_total_limit": 2}, resume=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1])["weights"] == whole[1]["weights"]
    logging.getLogger(__name__).info("%d kills at random moments", kills)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    result = drive(tmp_path, settings=SETTINGS, fail_at=["optimizer", 3])
    assert result.returncode == 1
    assert "checkpoint 3 could not be written" in result.stderr
    assert "checkpoint-2" in result.stderr.splitlines()[-1]
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_no_permission_is_said(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(TrainingError, match="Permission denied.*no earlier checkpoint"):
        make(tmp_path, SETTINGS).train()


def test_ctrl_c_finishes_the_step_and_goes_on_bit_for_bit(whole, tmp_path):
    trainer = make(tmp_path, {**SETTINGS, "save_steps": 100})
    step = trainer.training_step
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*args, **kwargs):
        if trainer.state.global_step == 4 and not trainer.stop.asked:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    trainer.training_step = interrupted
    trainer.train()
    assert trainer.stop.asked
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["checkpoint-5"]
    assert signal.getsignal(signal.SIGINT) is before
    again = make(tmp_path, {**SETTINGS, "save_steps": 100})
    again.train(resume_from_checkpoint=True)
    assert state_of(again) == whole[1]


def test_only_whole_checkpoints_count_when_old_ones_are_removed(tmp_path):
    for step in (1, 2, 3, 4):
        with checkpoint.writing(tmp_path, step, {}) as directory:
            (directory / "model.safetensors").write_bytes(b"x")
    (tmp_path / "checkpoint-9").mkdir()  # somebody's own, or upstream's: without a manifest
    checkpoint.rotate(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-9"]


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        make(tmp_path, SETTINGS).train(resume_from_checkpoint=True)

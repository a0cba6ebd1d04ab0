"""The trainer: gradients, ways to hold the pair, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_rank import Ranker
from dpo_rank.data.formats import parse
from dpo_rank.data.synthetic import lists, pairs
from dpo_rank.errors import DataError, ModelError, TrainingError
from dpo_rank.scoring.torch_engine import TorchEngine
from dpo_rank.training import DPOConfig, DPOTrainer, average_adapters
from dpo_rank.training.losses import LOSSES
from dpo_rank.training.run import starter_base, train
from dpo_rank.training.settings import adapter, read_settings
from tests.artifacts import tiny_pair
from tests.training.driver import make

pytestmark = pytest.mark.models
ROOT = Path(__file__).parents[2]


def trainer_of(tmp_path, rows=None, name="llama", peft_config=None, reference=True, **settings):
    policy, other, tok = tiny_pair(name)
    args = DPOConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", **{"per_device_train_batch_size": 4, **settings})
    return DPOTrainer(policy, other if reference else None, args, train_dataset=rows or list(pairs(12)), eval_dataset=list(pairs(6, seed=5)),
                      processing_class=tok, peft_config=peft_config)  # fmt: skip


def gradients(trainer, items=None):
    """Of one step on the given rows, and its loss."""
    batch = trainer.data_collator(items or trainer.train_groups)
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, batch, torch.tensor(batch["rows"]))
    return float(loss), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", [*LOSSES, "sft"])
def test_slicing_a_step_changes_no_gradient(tmp_path, loss):
    rows = [{**row, "weight": 0.5 + n % 3} for n, row in enumerate(lists(12))]
    whole, cut = (trainer_of(tmp_path, rows, loss_type=loss, token_budget=budget) for budget in (100_000, 90))
    assert len(whole.data_collator(whole.train_groups)["slices"]) == 1
    assert len(cut.data_collator(cut.train_groups)["slices"]) > 3
    (loss_a, a), (loss_b, b) = gradients(whole), gradients(cut)
    assert loss_a == pytest.approx(loss_b, rel=1e-5)
    assert a.keys() == b.keys()
    assert any(value.abs().max() > 1e-4 for value in a.values())
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6)


def test_accumulated_batches_of_unlike_size_are_the_mean_over_rows(tmp_path):
    trainer = trainer_of(tmp_path)
    _, together = gradients(trainer)
    trainer.model.zero_grad()
    for items in (trainer.train_groups[:7], trainer.train_groups[7:]):
        trainer.training_step(trainer.model, trainer.data_collator(items), torch.tensor(len(trainer.train_groups)))
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_loss_of_a_pair_and_its_copy_is_log_2(tmp_path, bf16):
    """Policy and reference run in one precision, else the pair begins with a difference that training did not make."""
    trainer = trainer_of(tmp_path, reference=False, bf16=bf16, max_steps=1, learning_rate=1e-9, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=6e-5)  # transformers 4 rounds it


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    (_, plain), (_, again) = (gradients(trainer_of(tmp_path, gradient_checkpointing=on)) for on in (False, True))
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-7)


def test_r_dpo_credits_length_in_training_alone(tmp_path):
    (loss, _), (credited, _) = (gradients(trainer_of(tmp_path, length_alpha=alpha)) for alpha in (0.0, 0.05))
    assert loss != pytest.approx(credited, abs=1e-4)
    plain, shaped = (trainer_of(tmp_path, length_alpha=alpha).evaluate() for alpha in (0.0, 0.05))
    assert plain["eval_rewards/margins"] == pytest.approx(shaped["eval_rewards/margins"], abs=1e-6)


def test_rpo_keeps_the_log_probs_of_the_better_answers(tmp_path):
    """Without it they fall with those of the worse ones."""
    chosen = {}
    for alpha in (0.0, 2.0):
        trainer = trainer_of(tmp_path / str(alpha), reference=False, rpo_alpha=alpha, learning_rate=5e-3, num_train_epochs=4)
        trainer.train()
        chosen[alpha] = trainer.evaluate(trainer.rows)["eval_rewards/chosen"]
    assert chosen[2.0] > chosen[0.0]
    assert chosen[2.0] > 0


@pytest.mark.parametrize(("rows", "loss"), [(list(pairs(6)), "sigmoid"), (list(lists(6)), "sigmoid")])
def test_the_loss_is_found_from_the_data(tmp_path, rows, loss):
    assert trainer_of(tmp_path, rows).loss_name == loss


def test_single_answers_train_pointwise_and_kto(tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"} for row in pairs(8) for kind in ("chosen", "rejected")
    ]
    assert trainer_of(tmp_path, rows).loss_name == "pointwise"
    for loss in ("pointwise", "kto"):
        trainer = trainer_of(tmp_path, rows, loss_type=loss, learning_rate=1e-2, num_train_epochs=15)
        before = trainer.evaluate(rows)
        trainer.train()
        after = trainer.evaluate(rows)
        assert after["eval_loss"] < before["eval_loss"] - 0.02, loss
        assert after["eval_accuracy"] > 0.7


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "softmax", "lambda_ndcg"])
def test_a_run_learns_its_rows(tmp_path, loss):
    trainer = trainer_of(tmp_path, list(lists(24)), loss_type=loss, learning_rate=5e-3, num_train_epochs=8, reference=False)
    trainer.train()
    assert trainer.evaluate(list(lists(24)))["eval_agreement"] > 0.9


def test_held_out_figures_are_those_of_scoring(tmp_path):
    from dpo_rank.evaluation.agreement import evaluate_scores, score_examples

    trainer = trainer_of(tmp_path, learning_rate=1e-2)
    trainer.train()
    ranker = Ranker.from_models(trainer.policy, tiny_pair()[1], tokenizer=tiny_pair()[2], beta=trainer.args.beta)
    examples = [parse(row) for row in pairs(6, seed=5)]
    scores = score_examples(ranker, examples)
    found = trainer.evaluate()
    assert found["eval_agreement"] == evaluate_scores("r", examples, scores).agreement.value
    assert found["eval_rewards/margins"] == pytest.approx(sum(float(a - b) for a, b in scores) / len(scores), abs=1e-5)
    assert found["eval_agreement_low"] <= found["eval_agreement"] <= found["eval_agreement_high"]


def test_precomputed_reference_log_probs_are_the_live_ones_and_kept(tmp_path):
    live, first = trainer_of(tmp_path / "a"), trainer_of(tmp_path / "b", precompute_ref_log_probs=True)
    assert first.reference is None
    (a, grads_a), (b, grads_b) = gradients(live), gradients(first)
    assert a == pytest.approx(b, abs=1e-6)
    for name in grads_a:
        torch.testing.assert_close(grads_a[name], grads_b[name], rtol=1e-3, atol=1e-6)
    files = sorted((tmp_path / "b").glob("reference-*"))
    times = [file.stat().st_mtime_ns for file in files]
    trainer_of(tmp_path / "b", precompute_ref_log_probs=True)
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "b").glob("reference-*"))] == times
    trainer_of(tmp_path / "b", list(pairs(13)), precompute_ref_log_probs=True)
    assert len(list((tmp_path / "b").glob("reference-*"))) == len(files) + 1  # other rows, other name; the held-out ones are known


def test_an_adapter_trains_against_its_own_base(tmp_path):
    trainer = trainer_of(tmp_path, name="llama", peft_config=adapter(4), reference=False, learning_rate=1e-2, num_train_epochs=4)
    loss, found = gradients(trainer)
    assert loss == pytest.approx(0.6931, abs=1e-4)
    assert found
    assert all("lora_" in name for name in found)
    base = {name: p.clone() for name, p in trainer.policy.get_base_model().named_parameters() if "lora_" not in name}
    trainer.train()
    for name, value in base.items():
        assert torch.equal(dict(trainer.policy.get_base_model().named_parameters())[name], value), name
    assert trainer.evaluate(list(pairs(12)))["eval_agreement"] > 0.7


@pytest.fixture
def model_path(tmp_path):
    policy, _, tok = tiny_pair()
    policy.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_an_adapters_artifact_holds_one_base_and_one_adapter(tmp_path, model_path):
    config = DPOConfig(evals=1, learning_rate=1e-2, precisions=("fp32",), use_cpu=True, disable_tqdm=True)
    result = train(model_path, list(pairs(40)), tmp_path / "ranker", config=config, peft_config=adapter(4))
    files = {path.relative_to(result.output).as_posix() for path in result.output.rglob("*") if path.is_file()}
    assert {"adapter/adapter_model.safetensors", "reference/model.safetensors"} <= files
    assert not any(name.startswith("policy/") for name in files)
    assert str(tmp_path) not in (result.output / "adapter" / "adapter_config.json").read_text()
    row = next(iter(pairs(1, seed=3)))
    scores = [
        Ranker.load(result.output, engine=engine, device="cpu").score(row["prompt"], [row["chosen"], row["rejected"]])
        for engine in ("onnx", "torch")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert abs(scores[0]).max() > 1e-3


def test_adapters_of_several_runs_are_averaged_exactly(tmp_path, model_path):
    paths = []
    for seed in (0, 1):
        trainer = trainer_of(tmp_path, peft_config=adapter(2), reference=False, learning_rate=1e-2, seed=seed)
        trainer.train()
        trainer.policy.save_pretrained(tmp_path / f"adapter{seed}")
        paths.append(tmp_path / f"adapter{seed}")
    from dpo_rank.scoring.pair import load_model, merged

    def merged_weights(model):
        return dict(merged((model, None))[0].named_parameters())

    from peft import PeftModel

    singles = [merged_weights(PeftModel.from_pretrained(load_model(model_path, torch.device("cpu"), "auto"), str(path))) for path in paths]
    both = merged_weights(average_adapters(model_path, paths))
    assert not torch.equal(singles[0]["model.layers.0.mlp.up_proj.weight"], singles[1]["model.layers.0.mlp.up_proj.weight"])
    for name, value in both.items():
        torch.testing.assert_close(value, (singles[0][name] + singles[1][name]) / 2, rtol=1e-4, atol=1e-6)
    with pytest.raises(DataError, match="at least two"):
        average_adapters(model_path, paths[:1])


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "gpt2"])
def test_the_top_layers_alone_are_trained_and_the_rest_is_shared(tmp_path, name):
    trainer = trainer_of(tmp_path, name=name, train_layers=1, reference=False, learning_rate=1e-2)
    trainer.train()
    assert TorchEngine(trainer.policy, trainer._frozen).shared_layers == 2
    with pytest.raises(DataError, match="from 1 to"):
        trainer_of(tmp_path, name=name, train_layers=4)


def test_the_first_loss_that_is_not_finite_stops_the_run_and_names_rows(tmp_path):
    trainer = trainer_of(tmp_path)
    with torch.no_grad():
        next(trainer.policy.parameters())[:, 0] = float("nan")
    before = [p.clone() for p in trainer.policy.parameters()]
    with pytest.raises(TrainingError, match=r"step 1: the loss is not finite \(rows: row \d"):
        trainer.train()
    assert all(
        torch.equal(a, b, equal_nan=True) if False else torch.allclose(a, b, equal_nan=True)
        for a, b in zip(before, trainer.policy.parameters(), strict=True)
    )


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path):
    trainer = trainer_of(tmp_path)
    parameter = next(trainer.policy.parameters())
    parameter.register_hook(lambda grad: grad * float("inf"))
    before = parameter.clone()
    with pytest.raises(TrainingError, match="step 1: the gradient is not finite"):
        trainer.train()
    assert torch.equal(parameter, before)


BAD = {
    "trust_remote_code": {"trust_remote_code": True},
    "max_length": {"max_length": 512},
    "sync_ref_model": {"sync_ref_model": True},
    "loss_weights": {"loss_weights": [1.0]},
    "padding_free": {"padding_free": True},
    "loss_type names 2": {"loss_type": ["sigmoid", "sft"]},
    "'bco_pair' is unknown": {"loss_type": "bco_pair"},
    "takes no temperature": {"loss_type": "sigmoid", "loss_temperature": 2.0},
    "does not go with": {"loss_type": "ipo", "reward": "sum"},
    "beta must be above 0": {"beta": 0.0},
    "rpo_alpha is a weight": {"rpo_alpha": -1.0},
    "rpo_alpha needs rows": {"rpo_alpha": 1.0, "loss_type": "kto"},
}


@pytest.mark.parametrize("message", BAD)
def test_an_option_that_is_not_here_is_refused_by_name(message, tmp_path):
    with pytest.raises(DataError, match=message):
        DPOConfig(str(tmp_path), **BAD[message])


BAD_ROWS = {
    "candidate 1 is empty": {"prompt": "a", "chosen": "b", "rejected": " "},
    "same text with different labels": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "has one candidate": {"prompt": "a", "completions": ["b"], "scores": [1.0]},
    "contradict 'chosen'": {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 2},
    "'label'": {"prompt": "a", "completion": "b", "label": "good"},
    "'weight'": {"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1},
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_row_that_cannot_be_trained_on_is_named(message, tmp_path):
    rows = [*pairs(3), BAD_ROWS[message]]
    with pytest.raises(DataError, match=f"row 3: .*{message}"):
        trainer_of(tmp_path, rows)
    trainer = trainer_of(tmp_path, rows, on_error="skip")
    assert len(trainer.rows) == 3
    assert message in str(trainer.problems)


def test_a_reference_with_another_tokenizer_is_refused(tmp_path, model_path):
    from tests.toks import tokenizer

    other = tokenizer("unigram")
    tiny_pair(tok=other)[0].save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    args = DPOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ModelError, match="tokenizers of the policy and of the reference"):
        DPOTrainer(model_path, str(tmp_path / "other"), args, train_dataset=list(pairs(3)))
    with pytest.raises(ModelError, match="token ids"):
        DPOTrainer(model_path, tiny_pair(tok=other)[1], args, train_dataset=list(pairs(3)))


def test_what_a_run_would_do_is_described(tmp_path):
    rows = [*pairs(10), {"prompt": "a", "completions": ["b", "c", "dd"], "scores": [1, 1, 0]}]
    turned = rows[0]
    rows.append({**turned, "chosen": turned["rejected"], "rejected": turned["chosen"]})
    trainer = trainer_of(tmp_path, rows, max_completion_tokens=6, gradient_accumulation_steps=2)
    facts = trainer.describe()
    assert (facts.rows, facts.candidates, facts.pairs) == (12, 25, 13)
    assert facts.tied == 1
    assert facts.contradictions == 1
    assert facts.answers_cut > 0
    assert facts.rows_a_step == 8
    assert facts.steps == 2
    assert facts.completion_tokens[2] == 6
    assert trainer.time_one_step() > 0


def test_settings_come_from_a_file_assignments_and_options(tmp_path):
    (tmp_path / "run.toml").write_text("beta = 0.3\nlearning_rate = 1e-3\nseed = 3\n")
    (tmp_path / "run.yaml").write_text("beta: 0.3\nlearning_rate: 1e-3\nseed: 3\n")
    for name in ("run.toml", "run.yaml"):
        found = read_settings(tmp_path / name, ["learning_rate=2e-3", "lr_scheduler_type=linear"], {"seed": 5})
        assert (found.beta, found.learning_rate, found.seed, str(found.lr_scheduler_type.value)) == (0.3, 2e-3, 5, "linear")
    with pytest.raises(DataError, match="'betta' is no setting"):
        read_settings(None, ["betta=1"], {})
    (tmp_path / "run.ini").write_text("")
    with pytest.raises(DataError, match="toml"):
        read_settings(tmp_path / "run.ini", [], {})


def torchrun(processes, script, directory):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", script, *directory]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    settings = {"num_train_epochs": 2, "token_budget": 120, "learning_rate": 1e-3, "save_strategy": "no"}
    rows = 24  # a last batch that two processes cannot share is filled up with rows from the start
    one = make(tmp_path / "one", {**settings, "per_device_train_batch_size": 4}, rows=list(pairs(rows)))
    one.train()
    losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    request = json.dumps({"settings": {**settings, "per_device_train_batch_size": 2}, "rows": rows})
    found = torchrun(2, "tests.training.driver", [str(tmp_path / "two"), request])
    assert found["losses"] == pytest.approx(losses, abs=1e-4)
    assert max(losses) - min(losses) > 1e-3


def test_sharded_parameters_take_the_same_two_steps(tmp_path):
    found = torchrun(2, "tests.training.sharded", [])
    assert found["sharded"] is True
    assert found["losses"] == pytest.approx(found["plain_losses"], abs=1e-5)
    assert found["largest_difference"] < 1e-5


def test_the_starters_base_can_be_trained_from(tmp_path):
    """Under both majors of transformers: what one of them writes, the other must read."""
    rows = [{"prompt": "Name a river.", "chosen": "The Danube.", "rejected": "No."}] * 2
    args = DPOConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1)
    trainer = DPOTrainer(starter_base(), args=args, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.encoder.tokenizer.get_vocab_size() == 5120

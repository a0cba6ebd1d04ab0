"""The loss of a batch equals TRL's DPOTrainer from the same raw rows and weights."""

import pytest

from dpo_rank import Ranker
from dpo_rank.training import DPOConfig, DPOTrainer
from tests.artifacts import tiny_pair
from tests.toks import KINDS, tokenizer

pytestmark = pytest.mark.models
pytest.importorskip("trl", reason="the dev extra installs trl")

PLAIN = [
    {"prompt": "How do I boil an egg?", "chosen": " Put it in boiling water.", "rejected": " No."},
    {"prompt": "What is 2 + 2?", "chosen": " It is 4, of course!", "rejected": " The quick brown fox jumps"},
    {"prompt": "hello there", "chosen": " how are you?", "rejected": " fox."},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
        "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
    }
    for row in PLAIN
] + [
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello there"},
            {"role": "user", "content": "What is 2 + 2?"},
        ],
        "chosen": [{"role": "assistant", "content": "It is 4."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
]
BETA = 0.3


OPTIONS = {"robust": {"label_smoothing": 0.2}, "sigmoid": {"label_smoothing": 0.0}}


def trl_trainer(policy, reference, tok, rows, directory, **options):
    from datasets import Dataset
    from trl import DPOConfig as Config
    from trl import DPOTrainer as Trainer

    args = Config(
        output_dir=str(directory),
        beta=BETA,
        max_length=None,
        per_device_train_batch_size=len(rows),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        **{"per_device_eval_batch_size": len(rows), **options},
    )
    data = Dataset.from_list(rows)
    return Trainer(model=policy, ref_model=reference, args=args, processing_class=tok, train_dataset=data, eval_dataset=data)


def our_figures(policy, reference, tok, rows, directory, boundary="joint", **options):
    args = DPOConfig(str(directory), beta=BETA, boundary=boundary, use_cpu=True, disable_tqdm=True, **options)
    return DPOTrainer(policy, reference, args, train_dataset=rows, eval_dataset=rows, processing_class=tok).evaluate()


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_the_rewards_equal_trl(kind, chat, tmp_path):
    tok = tokenizer(kind, chat=chat)
    rows = CHAT if chat else PLAIN
    policy, reference, _ = tiny_pair(tok=tok)
    theirs = trl_trainer(policy, reference, tok, rows, tmp_path).evaluate()
    policy, reference, _ = tiny_pair(tok=tok)  # a trainer may have changed the objects it was given
    split, joint = (our_figures(policy, reference, tok, rows, tmp_path, boundary) for boundary in ("split", "joint"))
    for name in ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"):
        assert joint[name] == pytest.approx(theirs[name], abs=1e-5), name
        if kind == "byte-bpe":  # nothing merges across these boundaries: the split is the joint tokenisation
            assert split[name] == pytest.approx(theirs[name], abs=1e-5), name
    assert abs(theirs["eval_loss"] - 0.6931) > 0.005


@pytest.mark.parametrize("loss", ["hinge", "ipo", "robust", "sigmoid_norm"])
def test_every_loss_that_trl_has_too_equals_its(loss, tmp_path):
    tok = tokenizer(chat=False)
    policy, reference, _ = tiny_pair(tok=tok)
    options = OPTIONS.get(loss, {})
    theirs = trl_trainer(policy, reference, tok, PLAIN, tmp_path, loss_type=[loss], **options).evaluate()
    policy, reference, _ = tiny_pair(tok=tok)
    ours = our_figures(policy, reference, tok, PLAIN, tmp_path, loss_type=loss, **options)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5, abs=1e-5)


def test_rpo_equals_trl_with_its_two_losses(tmp_path):
    tok = tokenizer(chat=False)
    policy, reference, _ = tiny_pair(tok=tok)
    row_by_row = {"per_device_eval_batch_size": 1}  # TRL's language modelling is a mean over the tokens of a batch, ours over rows
    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    theirs = trl_trainer(policy, reference, tok, PLAIN, tmp_path, **row_by_row, **both).evaluate()
    policy, reference, _ = tiny_pair(tok=tok)
    ours = our_figures(policy, reference, tok, PLAIN, tmp_path, rpo_alpha=0.5)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5, abs=1e-5)
    assert ours["eval_loss"] > 1.0  # 0.69 without


@pytest.mark.parametrize("chat", [False, True], ids=["standard", "conversational"])
def test_a_run_that_trl_trained_is_a_ranker_with_its_rewards(chat, tmp_path):
    tok = tokenizer(chat=chat)
    rows = CHAT if chat else PLAIN
    policy, reference, _ = tiny_pair(tok=tok)
    trainer = trl_trainer(policy, reference, tok, rows, tmp_path, learning_rate=1e-2, num_train_epochs=3, loss_type=["sigmoid"])
    trainer.train()
    found = trainer.evaluate()
    ranker = Ranker.from_models(trainer.model, trainer.ref_model, tokenizer=tok, beta=BETA, boundary="joint")
    text = lambda answer: answer if isinstance(answer, str) else answer[0]["content"]  # noqa: E731
    scores = [ranker.score(row["prompt"], [text(row["chosen"]), text(row["rejected"])]) for row in rows]
    for place, name in enumerate(("chosen", "rejected")):
        assert sum(float(pair[place]) for pair in scores) / len(scores) == pytest.approx(found[f"eval_rewards/{name}"], abs=1e-4)
    assert abs(found["eval_rewards/margins"]) > 0.05

"""The loss of a batch equals TRL's DPOTrainer from the same raw rows and weights."""

import pytest
import torch

from dpo_rank.data.formats import parse
from dpo_rank.scoring.derive import prompt_format
from dpo_rank.scoring.encode import Encoder, Limits, load_tokenizer
from dpo_rank.scoring.logps import TokenLogProbs
from dpo_rank.training.collate import TrainingGroup, collate, layout_of, per_candidate
from dpo_rank.training.losses import sigmoid
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


def trl_loss(policy, reference, tok, rows, directory):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(directory),
        beta=BETA,
        max_length=None,
        per_device_eval_batch_size=len(rows),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(model=policy, ref_model=reference, args=args, processing_class=tok, train_dataset=data, eval_dataset=data)
    return trainer.evaluate()["eval_loss"]


def our_loss(policy, reference, tok, rows, boundary):
    encoder = Encoder(load_tokenizer(tok.backend_tokenizer.to_str()), prompt_format(tok), Limits(500, 500), boundary=boundary)
    groups = []
    for row in map(parse, rows):
        encoded = encoder.encode(row.prompt, [candidate.text for candidate in row.candidates])
        groups.append(TrainingGroup(encoded.group, row.scores))
    batch = collate(groups)
    with torch.no_grad():
        logps = [TokenLogProbs(model)(layout_of(batch)) for model in (policy, reference)]
    rewards = BETA * per_candidate(logps[0] - logps[1], batch, mean=False)
    return float(sigmoid(rewards, batch["mask"], batch["targets"]).mean())


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_equals_trl(kind, chat, tmp_path):
    tok = tokenizer(kind, chat=chat)
    policy, reference, _ = tiny_pair(tok=tok)
    rows = CHAT if chat else PLAIN
    theirs = trl_loss(policy, reference, tok, rows, tmp_path)
    policy, reference, _ = tiny_pair(tok=tok)  # the trainer may have changed the objects it was given
    split, joint = (our_loss(policy, reference, tok, rows, boundary) for boundary in ("split", "joint"))
    assert joint == pytest.approx(theirs, abs=1e-5)
    if kind == "byte-bpe":  # nothing merges across these boundaries: the split is the joint tokenisation
        assert split == pytest.approx(theirs, abs=1e-5)
    assert abs(theirs - 0.6931) > 0.005

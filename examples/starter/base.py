"""Stage 1 of the starter: a tokenizer and a small language model, the reference of the pair.

    python examples/starter/base.py --output runs/starter/text-base
    python examples/starter/base.py --start runs/starter/text-base --epochs 2 --copies 0.33 --lr 1e-3 --output models/starter-base

A 5.7 M-parameter Llama shape (6 layers, 256 wide) with its own 5,120-token byte-level BPE, language-modelled on the texts
of `texts.py`. Prompts that the hash holds out are never seen, here or later.

So few texts do not teach so small a model to copy: after the first command a sequence of random tokens is as surprising the second
time as the first (11.3 nats a token). The second command reads the texts on, and repeated spans between them: what tells an echo of
the prompt, a loop, or an answer that speaks of the prompt's subject begins with attention that finds a token's earlier place
(induction heads: Olsson et al. 2022, https://arxiv.org/abs/2209.11895).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from texts import Row, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from dpo_rank.data.formats import held_out
from dpo_rank.scoring.prompt_format import PassageFormat

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def conversations(rows: dict[str, list[Row]]) -> Iterator[list[dict[str, str]]]:
    """Every training conversation, both answers of a pair among them."""
    for pair in rows["hh_harmless.train"]:
        if not held_out(pair["prompt"]):
            yield pair["prompt"] + pair["chosen"]
            yield pair["prompt"] + pair["rejected"]
    for name in ("gsm8k.sft", "halueval_general.sft"):
        for row in rows[name]:
            if not held_out(row["prompt"]):
                yield [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    for row in rows["halueval_qa.train"]:
        if not held_out(row["prompt"]):
            prompt = PassageFormat().render([passage["text"] for passage in row["passages"]]) + row["prompt"]
            for completion in row["completions"]:
                yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def text(turns: list[dict[str, str]]) -> str:
    return "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in turns)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def blocks(documents: list[list[int]], length: int, epochs: int, seed: int) -> list[dict[str, list[int]]]:
    """Documents joined in a new random order each epoch and cut into rows of ``length`` tokens."""
    rng = random.Random(seed)
    stream: list[int] = []
    for _ in range(epochs):
        rng.shuffle(documents)
        for document in documents:
            stream += document
    return [{"input_ids": stream[i : i + length], "labels": stream[i : i + length]} for i in range(0, len(stream) - length + 1, length)]


def fresh(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def copies(documents: list[list[int]], length: int, count: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    """``count`` rows of spans that come twice, at a distance of up to 20 tokens; random tokens are learned at their second place alone."""
    rng = random.Random(seed)
    stream = [token for document in documents for token in document]

    def cut(size: int) -> list[int]:
        start = rng.randrange(len(stream) - size)
        return stream[start : start + size]

    rows = []
    for _ in range(count):
        tokens: list[int] = []
        labels: list[int] = []
        while len(tokens) < length:
            size = int(math.exp(rng.uniform(math.log(8), math.log(length / 3))))
            between = cut(rng.choice((0, 0, 1, 20)))
            if rng.random() < 0.6:
                span = [rng.randrange(len(SPECIAL), vocabulary) for _ in range(size)]
                labels += [-100] * size
            else:
                span = cut(size)
                labels += span
            tokens += span + between + span
            labels += between + span
        rows.append({"input_ids": tokens[:length], "labels": labels[:length]})
    return rows


@torch.inference_mode()
def second_time(model: LlamaForCausalLM, vocabulary: int) -> float:
    """Nats a token for 100 random tokens that were read just before: the logarithm of the vocabulary where nothing is copied."""
    tokens = torch.randint(len(SPECIAL), vocabulary, (16, 100), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    logps = model(tokens).logits[:, 100:-1].float().log_softmax(-1)
    return float(-logps.gather(-1, tokens[:, 101:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=None, help="folder of the jsonl.gz files, or 'hub' for the public datasets")
    parser.add_argument("--output", type=Path, default=Path("models/starter-base"))
    parser.add_argument("--start", type=Path, default=None, help="go on from this model, with its tokenizer")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--copies", type=float, default=0.0, help="share of the rows that are repeated spans")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    texts = [text(turns) for turns in conversations(load(args.data))]
    torch.manual_seed(args.seed)
    if args.start is None:
        tokenizer = train_tokenizer(texts, vocabulary=5120)
        model = fresh(tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    documents = list(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows = blocks(documents, length=768, epochs=args.epochs, seed=args.seed)
    rows += copies(documents, 768, round(len(rows) * args.copies / (1 - args.copies)), len(tokenizer), args.seed)
    print(f"{len(documents)} conversations, {sum(map(len, documents)):,} tokens, {len(rows):,} rows of 768")
    print(f"{model.num_parameters():,} parameters")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output / "run"),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=args.lr,
            warmup_steps=60,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=25,
            save_strategy="no",
            report_to=[],
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=rows,
    )
    trainer.train()
    print(f"random tokens read a second time: {second_time(model.eval(), len(tokenizer)):.2f} nats a token")
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    settings = args.output / "tokenizer_config.json"  # transformers 5 writes a class that 4 does not know
    written = {**json.loads(settings.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("backend", "is_local", "local_files_only"):
        written.pop(name, None)
    settings.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

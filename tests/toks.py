"""Tiny tokenizers of the three kinds that models use, trained on a few lines in the test."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is 2 + 2? It is 4, of course!",
    "How do I boil an egg? Put it in boiling water for seven minutes, then cool it.",
    "user assistant system Be brief. hello there how are you I am fine thank you",
    "No. Yes. Maybe it depends. River stone amber quiet orchard lantern silver meadow.",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("byte-bpe", "sentencepiece-bpe", "unigram")


def tokenizer(kind: str = "byte-bpe", chat: bool = True, bos: bool = False) -> Any:
    """A fast tokenizer; ``bos`` makes it put ``<s>`` in front of a text."""
    if kind == "byte-bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.train_from_iterator(
            CORPUS,
            trainers.BpeTrainer(
                vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
            ),
        )
    elif kind == "sentencepiece-bpe":  # as Llama-2 writes it: a dummy space in front, by a normalizer
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        made.train_from_iterator(
            CORPUS,
            trainers.BpeTrainer(vocab_size=300, special_tokens=[*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False),
        )
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace()
        made.train_from_iterator(
            CORPUS, trainers.UnigramTrainer(vocab_size=160, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
        )
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    if chat:
        fast.chat_template = CHAT
    return fast

"""Models of known shapes with random weights, and the rankers made of them; built once under ``--cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "134M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "15M": {
        "model_type": "llama",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 5120,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}
ROLES = ("policy", "reference")


def config(shape: str) -> Any:
    """The transformers config of a shape."""
    from transformers import AutoConfig

    values = dict(SHAPES[shape])
    return AutoConfig.for_model(values.pop("model_type"), **values, pad_token_id=0, bos_token_id=0, eos_token_id=0)


def tokenizer(shape: str) -> Any:
    """One word a token: ``w7`` is id 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(SHAPES[shape]["vocab_size"])}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0", unk_token="w1")


def pair(shape: str, cache: Path) -> dict[str, Path]:
    """Directories of policy and reference."""
    import torch
    from transformers import AutoModelForCausalLM

    paths = {role: cache / shape / role for role in ROLES}
    for seed, path in enumerate(paths.values()):
        if not (path / "model.safetensors").is_file():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config(shape)).save_pretrained(path)
            tokenizer(shape).save_pretrained(path)
    return paths


def cross_encoder(shape: str, cache: Path) -> Path:
    """A cross-encoder of the shape: one model with one logit a sequence."""
    import torch
    from transformers import AutoModelForSequenceClassification

    path = cache / shape / "cross-encoder"
    if not (path / "model.safetensors").is_file():
        torch.manual_seed(2)
        settings = config(shape)
        settings.num_labels = 1
        AutoModelForSequenceClassification.from_config(settings).save_pretrained(path)
        tokenizer(shape).save_pretrained(path)
    return path


def sharing_pair(shape: str, cache: Path) -> dict[str, Path]:
    """Directories of a policy and a reference that differ in their top third of layers alone."""
    from transformers import AutoModelForCausalLM

    paths = pair(shape, cache)
    shared = paths["reference"].with_name("reference-sharing")
    if not (shared / "model.safetensors").is_file():
        model, other = (AutoModelForCausalLM.from_pretrained(path) for path in paths.values())
        layers = model.model.layers
        for index in range(len(layers) - len(layers) // 3, len(layers)):
            layers[index].load_state_dict(other.model.layers[index].state_dict())
        model.save_pretrained(shared)
        tokenizer(shape).save_pretrained(shared)
    return {"policy": paths["policy"], "reference": shared}


def artifact(shape: str, cache: Path, precisions: tuple[str, ...], sharing: bool = False) -> Path:
    """The pair, or the one that shares the lower two thirds, as a ranker with these precisions."""
    from dpo_rank import Ranker

    path = cache / shape / f"ranker-{'sharing-' if sharing else ''}{'-'.join(precisions)}"
    if not path.is_dir():
        paths = (sharing_pair if sharing else pair)(shape, cache)
        Ranker.from_models(str(paths["policy"]), str(paths["reference"]), device="cpu").export(path, precisions)
    return path

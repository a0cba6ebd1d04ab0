"""Tiny random models in many architectures, made from configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 67
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "llama-tied-biased": ("llama", {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {**_COMMON, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2-window": ("qwen2", {**_GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": None}),
    "mistral-window": ("mistral", {**_GROUPED, "sliding_window": 5}),
    "olmo2": ("olmo2", _GROUPED),
    "gemma2": (
        "gemma2",
        {
            **_GROUPED,
            "head_dim": 16,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**_GROUPED, "head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt-oss": ("gpt_oss", {**_GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "phi3": ("phi3", {**_GROUPED, "sliding_window": None}),
    "gpt2": ("gpt2", {**_GPT, **_NO_DROPOUT}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt-neox": ("gpt_neox", {**_COMMON, "rotary_pct": 0.5}),
    "starcoder2": ("starcoder2", {**_GROUPED, "residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": None}),
    "starcoder2-window": ("starcoder2", {**_GROUPED, "residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 7}),
    "granite": (
        "granite",
        {**_GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "cohere": ("cohere", {**_GROUPED, "logit_scale": 0.3}),
    "gpt-neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 128,
            "intermediate_size": 48,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
}
FALLBACK = ("gpt-neo", "bloom")
"""Architectures outside the attention registry: they take the padded batch."""
PACKED = tuple(name for name in CONFIGS if name not in FALLBACK)


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode with weights large enough that its log-probs are far from uniform."""
    model_type, settings = CONFIGS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.15 if parameter.dim() > 1 else 0.05))
    return model


def on_this_major(names: Sequence[str]) -> list[str]:
    """Architectures whose graphs are traced: all under transformers 5, every third under 4.

    A trace takes half a minute, and what it records is our own module; that each architecture *scores* alike is tested under both.
    """
    return list(names) if transformers.__version__ >= "5" else list(names[::3])

"""Ways to hold a pair while its policy trains: a frozen copy, an adapter over one base, or a trunk that both share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_rank.errors import DataError, ModelError
from dpo_rank.scoring.pair import load_model
from dpo_rank.scoring.shared_trunk import layers_of


def frozen_copy(model: Any) -> Any:
    """A copy of ``model`` as its frozen reference."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    frozen.config._attn_implementation = "sdpa" if frozen._supports_sdpa else "eager"
    return frozen


def with_adapter(model: Any, peft_config: Any) -> Any:
    """A peft model over ``model``; its reference is the base with the adapter off.

    Raises:
        ModelError: the adapter changes the sequence itself, or trains parts of the base.

    """
    from peft import get_peft_model

    if getattr(peft_config, "is_prompt_learning", False):
        raise ModelError("prompt-learning adapters change the sequence itself and cannot be scored; use LoRA")
    if getattr(peft_config, "modules_to_save", None):
        raise ModelError("modules_to_save would train copies of the base's own modules, which no reference has; leave it out")
    return get_peft_model(model, peft_config)


def freeze_below(model: Any, train_layers: int) -> None:
    """Leave only the top ``train_layers`` layers, the final norm and an untied head trainable.

    A head that is tied to the embedding stays as it is: the embedding stands below the layers that the pair shares.

    Raises:
        DataError: the model has fewer layers.

    """
    layers = layers_of(model)
    if layers is None or not 0 < train_layers <= len(layers):
        raise DataError(f"train_layers must be from 1 to the model's {model.config.num_hidden_layers} layers, not {train_layers}")
    model.requires_grad_(False)
    for layer in layers[-train_layers:]:
        layer.requires_grad_(True)
    holder = next(module for module in model.modules() if any(child is layers for child in module.children()))
    children = list(holder.children())
    for child in children[next(n for n, child in enumerate(children) if child is layers) + 1 :]:
        child.requires_grad_(True)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Module) and head.weight is not table.weight:
        head.requires_grad_(True)


def average_adapters(base: str | Path, adapters: Sequence[str | Path]) -> Any:
    """One peft model whose adapter is the mean of several runs' adapters over one base, exactly: their ranks are put side by side.

    Merged into the base it costs nothing at inference (model soups, Wortsman et al. 2022, arXiv 2203.05482).

    Args:
        base: path or id of the base that every adapter was trained on.
        adapters: directories of LoRA adapters.

    Raises:
        DataError: fewer than two adapters.

    """
    from peft import PeftModel

    if len(adapters) < 2:
        raise DataError(f"an average needs at least two adapters, got {len(adapters)}")
    model = PeftModel.from_pretrained(load_model(base, torch.device("cpu"), "auto"), str(adapters[0]), adapter_name="run0")
    names = ["run0"]
    for number, path in enumerate(adapters[1:], start=1):
        names.append(f"run{number}")
        model.load_adapter(str(path), adapter_name=names[-1])
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "default", combination_type="cat")
    model.set_adapter("default")
    for name in names:
        model.delete_adapter(name)
    return model.eval()

"""A pair whose bottom layers are equal runs them once.

Training that touches only the top k of L layers (an adapter on them, a frozen bottom) leaves a pair of 1 + k / L passes. Which layers
are equal is found from the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpo_rank.scoring.logps import TokenLogProbs, trunk_name


def same_architecture(policy: Any, reference: Any) -> bool:
    """Whether the two models' configs describe one computation."""
    skipped = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "architectures"}
    first, second = policy.config.to_dict(), reference.config.to_dict()
    return all(first.get(key) == second.get(key) for key in (first.keys() | second.keys()) - skipped)


def share_trunk(policy: TokenLogProbs, reference: TokenLogProbs) -> int:
    """Let ``reference`` take the hidden states of its equal bottom layers from ``policy``; returns how many layers these are.

    Both are views: the models behind them keep their layers.
    """
    if not (policy.packed and reference.packed and same_architecture(policy.model, reference.model)):
        return 0
    ours, theirs = layers_of(policy.model), layers_of(reference.model)
    if ours is None or theirs is None or not _equal_before(policy.model, reference.model):
        return 0
    shared = 0
    while shared < len(ours) and _equal(ours[shared], theirs[shared]):
        shared += 1
    if not 0 < shared < len(ours):
        return 0
    ours[shared - 1] = _HandOn(ours[shared - 1])
    for index in range(shared):
        theirs[index] = _TakeOver(theirs[index])
    return shared


class _Stand(nn.Module):
    """Stands in a layer's place; what a model asks of its layers is the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.facts = {name: value for name, value in vars(layer).items() if not name.startswith("_")}

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        return facts[name] if name in facts else super().__getattr__(name)


class _HandOn(_Stand):
    """The policy's last shared layer: what it gives is kept for the reference."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.layer = layer

    def forward(self, *args: Any, packed: Any, **kwargs: Any) -> Any:
        packed.handed_on = self.layer(*args, packed=packed, **kwargs)
        return packed.handed_on


class _TakeOver(_Stand):
    """A shared layer of the reference."""

    def forward(self, *_: Any, packed: Any, **__: Any) -> Any:
        return packed.handed_on


def layers_of(model: Any) -> nn.ModuleList | None:
    """The list of a model's layers."""
    count = int(model.config.num_hidden_layers)
    trunk = getattr(model, trunk_name(model))
    found = [module for module in trunk.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return found[0] if len(found) == 1 else None


def _equal_before(policy: Any, reference: Any) -> bool:
    """Whether everything that stands before the layers is equal."""
    return all(
        _equal(ours, theirs)
        for ours, theirs in zip(_before_layers(policy), _before_layers(reference), strict=True)
    )  # fmt: skip


def _before_layers(model: Any) -> Iterator[nn.Module]:
    layers = layers_of(model)
    holder = next(module for module in model.modules() if any(child is layers for child in module.children()))
    for child in holder.children():
        if child is layers:
            return
        yield child


def _equal(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules hold the same numbers, and none is an adapter's."""
    if any(hasattr(module, "_disable_adapters") for root in (ours, theirs) for module in root.modules()):
        return False
    first, second = ({**dict(root.named_parameters()), **dict(root.named_buffers())} for root in (ours, theirs))
    return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))

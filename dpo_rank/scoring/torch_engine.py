"""The torch engine: two transformers models over packed rows, on any device torch has."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from dpo_rank.errors import ModelError, UnavailableError
from dpo_rank.scoring.attention import Pass
from dpo_rank.scoring.engine import FloatArray, KeyValues
from dpo_rank.scoring.logps import TokenLogProbs, to_tensors, view
from dpo_rank.scoring.pack import IntArray, Row
from dpo_rank.scoring.shared_trunk import share_trunk

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


class TorchEngine:
    """A policy and its reference as transformers models; the models that were passed in are left as they are.

    Args:
        policy: the model trained with a DPO loss, or a peft model.
        reference: the model it was trained against; None for a peft policy: its base with the adapter off.
        packed: see `TokenLogProbs`.

    Attributes:
        shared_layers: equal layers from the bottom, computed once for both.

    """

    name = "torch"

    def __init__(self, policy: Any, reference: Any | None = None, *, packed: bool | None = None) -> None:
        policy, reference = plain_models(policy, reference)
        if policy.config.vocab_size != reference.config.vocab_size:
            raise ModelError(
                f"policy and reference must share their token ids: the policy has {policy.config.vocab_size}, "
                f"the reference {reference.config.vocab_size}"
            )
        if policy.device != reference.device:
            raise ModelError(f"policy and reference must be on one device, not {policy.device} and {reference.device}")
        self.policy = TokenLogProbs(policy, packed=packed)
        self.reference = TokenLogProbs(reference, packed=packed)
        self.shared_layers = share_trunk(self.policy, self.reference)
        self.device = str(policy.device)
        self.precision = PRECISIONS.get(policy.dtype, str(policy.dtype))

    @property
    def takes_past(self) -> bool:
        """Whether both models read packed rows."""
        return self.policy.packed and self.reference.packed

    def logps(self, row: Row) -> tuple[FloatArray, FloatArray]:
        """Log-probs in nats of the row's targets under policy and reference, float32 ``[M]`` each."""
        with torch.inference_mode():
            layout = to_tensors(row.layout, self.device)
            if self.takes_past:
                first = Pass(layout)
                policy, reference = self.policy.scored(first), self.reference.scored(first.above(self.shared_layers, None))
            else:
                policy, reference = self.policy(layout), self.reference(layout)
        return policy.cpu().numpy(), reference.cpu().numpy()

    def memory(self, capacity: int) -> KeyValues:
        """Tensors in the models' own precision, on their device."""
        return KeyValues(functools.partial(torch.empty, dtype=self.policy.model.dtype, device=self.device), capacity)

    def continued(self, row: Row, past: KeyValues, keep: IntArray | None = None) -> tuple[FloatArray, FloatArray]:
        """`logps` of a row behind ``past``; the keys and values of the row's places ``keep`` are appended to ``past``."""
        with torch.inference_mode():
            layout = to_tensors(row.layout, self.device)
            kept_places = torch.from_numpy(np.zeros(0, dtype=np.int64) if keep is None else keep).to(self.device)
            before = past.arrays if len(past) else (None, None)
            first = Pass(layout, before[0], kept_places)
            policy = self.policy.scored(first)
            second = first.above(self.shared_layers, before[1])
            reference = self.reference.scored(second)
        if keep is not None:
            past.append([torch.stack(carried.kept, dim=1) for carried in (first, second)])
        return policy.cpu().numpy(), reference.cpu().numpy()


def plain_models(policy: Any, reference: Any | None) -> tuple[Any, Any]:
    """The transformers models behind ``policy`` and ``reference``; for a peft policy alone, twice its base, adapter on and off."""
    if reference is None:
        if not hasattr(policy, "peft_config"):
            raise ModelError("a reference is needed: only a peft policy brings its own (its base with the adapter off)")
        return _inside_peft(policy), _adapter_off(_inside_peft(policy))
    return _inside_peft(policy), _inside_peft(reference)


def _inside_peft(model: Any) -> Any:
    if not hasattr(model, "peft_config"):
        return model
    if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
        raise ModelError("prompt-learning adapters change the sequence itself and cannot be scored; use LoRA or merge the adapter")
    return model.get_base_model()


def _adapter_off(model: Any) -> Any:
    """A view of ``model`` whose adapter layers pass their input to the base layer alone."""
    base = view(model)
    found = False
    for module in base.modules():
        if hasattr(module, "_disable_adapters"):
            module._disable_adapters = True
            found = True
    if not found:
        raise ModelError("the peft policy has no adapter layers that can be switched off; give its reference")
    return base


def pick_device(device: str) -> torch.device:
    """``"auto"``: the first CUDA device, else the CPU; any other name must be usable.

    Raises:
        UnavailableError: the device is not there.

    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UnavailableError(f"device {device!r} is not usable by torch here: {str(error).splitlines()[0]}") from None
    return found

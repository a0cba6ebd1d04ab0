"""Pairs that others exported as plain ONNX decoders with optimum: scored by the padded batch, one candidate a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_rank.errors import MissingExtraError, ModelError
from dpo_rank.scoring.engine import FloatArray
from dpo_rank.scoring.logps import expand, padded, to_tensors
from dpo_rank.scoring.pack import Row


class OptimumEngine:
    """Two ``ORTModelForCausalLM`` directories."""

    name = "onnx"
    device = "cpu"
    precision = "fp32"
    takes_past = False

    def __init__(self, policy: Path, reference: Path) -> None:
        try:
            from optimum.onnxruntime import ORTModelForCausalLM
        except ImportError:
            raise MissingExtraError("scoring exported ONNX decoders", "optimum") from None
        self._models = []
        for path in (policy, reference):
            cached = any("past" in file.name for file in path.glob("*.onnx"))
            try:
                self._models.append(ORTModelForCausalLM.from_pretrained(path, use_cache=cached, use_io_binding=False))
            except ValueError:  # exported with a cache under the plain name
                self._models.append(ORTModelForCausalLM.from_pretrained(path, use_cache=True, use_io_binding=False))
        self.config = self._models[0].config
        if self._models[1].config.vocab_size != self.config.vocab_size:
            raise ModelError("policy and reference must share their token ids: their vocabularies differ in size")

    def logps(self, row: Row) -> tuple[FloatArray, FloatArray]:
        """Log-probs in nats of the row's targets under policy and reference, float32 ``[M]`` each."""
        layout = to_tensors(row.layout, "cpu")
        sequences, spans = expand(layout)
        ids, mask = padded(sequences)
        results = [self._logps(model, ids, mask, spans, layout.targets) for model in self._models]
        return results[0], results[1]

    @staticmethod
    def _logps(model: Any, ids: torch.Tensor, mask: torch.Tensor, spans: list[tuple[int, int]], targets: torch.Tensor) -> FloatArray:
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            rows = torch.cat([logits[line, start:end] for line, (start, end) in enumerate(spans)]).float()
            logps = rows.gather(1, targets[:, None])[:, 0] - rows.logsumexp(1)
        return np.asarray(logps, dtype=np.float32)

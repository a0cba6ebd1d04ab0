"""Exported graphs on OpenVINO: an engine of its own, through the ``openvino`` package."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_rank.errors import ArtifactError, MissingExtraError
from dpo_rank.scoring.graph_engine import GraphEngine, available_cpus

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
"""What OpenVINO computes an fp32 graph in, by our name for it."""


class OpenVinoEngine(GraphEngine):
    """A policy and its reference on OpenVINO's CPU plugin.

    Args:
        directory: holds ``policy.onnx`` and ``reference.onnx``, or ``pair.onnx``, with their external data, in fp32.
        precision: a key of `PRECISIONS`.
        threads: None: the CPUs that this process may use.

    """

    name = "openvino"
    device = "cpu"

    def __init__(self, directory: Path, precision: str, *, threads: int | None = None) -> None:
        self.precision = precision
        super().__init__(directory, threads or available_cpus(), side_by_side=False)

    def _start(self) -> None:
        # Two requests at once, from two Python threads, hung in OpenVINO 2026.4: one after the other, each with all threads.
        self._one_at_a_time = threading.Lock()
        super()._start()

    def open_graph(self, role: str, threads: int) -> _Compiled:
        """The graph of ``"policy"``, ``"reference"`` or ``"pair"``, to run with ``threads``."""
        return _Compiled(self.directory / f"{role}.onnx", PRECISIONS[self.precision], threads, self._one_at_a_time)


class _Compiled:
    def __init__(self, path: Path, precision: str, threads: int, one_at_a_time: threading.Lock) -> None:
        try:
            import openvino
        except ImportError:
            raise MissingExtraError("engine 'openvino'", "openvino") from None
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        try:
            self._model = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: OpenVINO cannot load it: {error}") from error
        self._request = self._model.create_infer_request()
        self._one_at_a_time = one_at_a_time

    def input_shapes(self) -> Mapping[str, Sequence[Any]]:
        return {
            value.any_name: [size.get_length() if size.is_static else None for size in value.partial_shape] for value in self._model.inputs
        }

    def run(self, outputs: Sequence[str], inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        with self._one_at_a_time:
            self._request.infer(dict(inputs))
            return [np.array(self._request.get_tensor(name).data) for name in outputs]

"""Exported graphs on onnxruntime, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from dpo_rank.errors import ArtifactError, UnavailableError
from dpo_rank.scoring.graph_engine import GraphEngine, available_cpus

GPU_PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider")


def pick_providers(device: str, providers: Sequence[Any] | None) -> list[Any]:
    """Onnxruntime's execution providers for ``device``, or those asked for by name.

    Raises:
        UnavailableError: one of them is not usable here.

    """
    usable = onnxruntime.get_available_providers()
    if providers is not None:
        for provider in providers:
            if (name := _name(provider)) not in usable:
                raise UnavailableError(f"onnxruntime provider {name!r} is not available here; there are {', '.join(usable)}")
        return list(providers)
    on_gpu = [name for name in GPU_PROVIDERS if name in usable]
    if device == "cpu" or (device == "auto" and not on_gpu):
        return ["CPUExecutionProvider"]
    if device in ("auto", "cuda", "gpu") or device.startswith("cuda:"):
        if not on_gpu:
            raise UnavailableError(f"device {device!r}: this onnxruntime has no GPU provider; there are {', '.join(usable)}")
        options = {"device_id": int(device.partition(":")[2] or 0)}
        return [(on_gpu[0], options), "CPUExecutionProvider"]
    raise UnavailableError(f"device {device!r} is not known to the ONNX engine: use 'cpu', 'cuda' or 'cuda:N'")


def _name(provider: Any) -> str:
    """Of a provider given as its name, or as name and options."""
    return str(provider[0] if isinstance(provider, tuple) else provider)


class OnnxEngine(GraphEngine):
    """A policy and its reference on onnxruntime.

    Args:
        directory: holds ``policy.onnx`` and ``reference.onnx``, or ``pair.onnx``, with their external data.
        precision: name of what they hold, for the caller's eyes.
        threads: of onnxruntime; None: the CPUs that this process may use.
        device, providers: see `pick_providers`.

    """

    name = "onnx"

    def __init__(
        self,
        directory: Path,
        precision: str,
        *,
        threads: int | None = None,
        device: str = "auto",
        providers: Sequence[Any] | None = None,
    ) -> None:
        self.precision = precision
        self.providers = pick_providers(device, providers)
        self.device = "cpu" if _name(self.providers[0]) in ("CPUExecutionProvider", "OpenVINOExecutionProvider") else "cuda:0"
        super().__init__(directory, threads or available_cpus(), side_by_side=self.device == "cpu")

    def open_graph(self, role: str, threads: int) -> _Session:
        """The graph of ``"policy"``, ``"reference"`` or ``"pair"``, to run with ``threads``."""
        return _Session(self.directory / f"{role}.onnx", threads, self.providers)


class _Session:
    def __init__(self, path: Path, threads: int, providers: Sequence[Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # A plan of memory is made for rows of one size and spreads buffers over it; without one they are reused while in cache.
        options.enable_mem_pattern = False
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ArtifactError(f"{path}: onnxruntime cannot load it: {error}") from error
        first = self._session.get_providers()[0]
        wanted = _name(providers[0])
        if first != wanted:
            raise UnavailableError(f"onnxruntime provider {wanted!r} did not start; it fell back to {first}")

    def input_shapes(self) -> Mapping[str, Sequence[Any]]:
        return {value.name: value.shape for value in self._session.get_inputs()}

    def run(self, outputs: Sequence[str], inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        found: list[npt.NDArray[Any]] = self._session.run(list(outputs), dict(inputs))
        return found

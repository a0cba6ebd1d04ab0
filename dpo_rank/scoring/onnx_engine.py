"""The ONNX engine: two graphs of one shape on onnxruntime, without torch."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from dpo_rank.errors import ArtifactError, UnavailableError
from dpo_rank.scoring.engine import FloatArray
from dpo_rank.scoring.pack import IntArray, Layout, Row

GPU_PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider")


def feeds(layout: Layout[IntArray]) -> dict[str, IntArray]:
    """The inputs of the exported graph, prompt and run tokens apart."""
    num_prompt = len(layout.prompt_slot)
    named = layout._asdict()
    ids, positions = named.pop("input_ids"), named.pop("positions")
    return {
        "prompt_ids": ids[:num_prompt],
        "run_ids": ids[num_prompt:],
        "prompt_positions": positions[:num_prompt],
        "run_positions": positions[num_prompt:],
        **named,
    }


def available_cpus() -> int:
    """CPUs that this process may use: affinity and, in a container, the cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return count


def pick_providers(device: str, providers: Sequence[Any] | None) -> list[Any]:
    """Onnxruntime's execution providers for ``device``, or those asked for by name.

    Raises:
        UnavailableError: one of them is not usable here.

    """
    usable = onnxruntime.get_available_providers()
    if providers is not None:
        for provider in providers:
            name = provider[0] if isinstance(provider, tuple) else provider
            if name not in usable:
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


class OnnxEngine:
    """A policy and its reference as exported graphs.

    Args:
        directory: holds ``policy.onnx`` and ``reference.onnx`` with their external data.
        precision: name of what they hold, for the caller's eyes.
        threads: of onnxruntime; None: the CPUs that this process may use.
        device, providers: see `pick_providers`.

    In a forked child the sessions are opened anew: onnxruntime's threads do not survive a fork.

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
        self.directory, self.precision = directory, precision
        self.threads = threads or available_cpus()
        self.providers = pick_providers(device, providers)
        self._lock = threading.Lock()
        self._open()
        first = self._sessions[0].get_providers()[0]
        wanted = self.providers[0][0] if isinstance(self.providers[0], tuple) else self.providers[0]
        if first != wanted:
            raise UnavailableError(f"onnxruntime provider {wanted!r} did not start; it fell back to {first}")
        self.device = "cpu" if first in ("CPUExecutionProvider", "OpenVINOExecutionProvider") else "cuda:0"

    def _open(self) -> None:
        self._pid = os.getpid()
        self._sessions = [self._session(self.directory / f"{role}.onnx") for role in ("policy", "reference")]

    def _session(self, path: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=self.providers)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ArtifactError(f"{path}: onnxruntime cannot load it: {error}") from error

    def logps(self, row: Row) -> tuple[FloatArray, FloatArray]:
        """Log-probs in nats of the row's targets under policy and reference, float32 ``[M]`` each."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    for session in self._sessions:
                        # Destroying a session joins its threads, which the fork left behind: it would wait for ever.
                        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
                    self._open()
        inputs = feeds(row.layout)
        policy, reference = (np.asarray(session.run(["logps"], inputs)[0], dtype=np.float32) for session in self._sessions)
        return policy, reference

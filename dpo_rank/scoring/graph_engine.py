"""What runs exported graphs: the inputs of a graph, and an engine over two of them whatever the runtime."""

from __future__ import annotations

import abc
import ctypes
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dpo_rank.scoring.engine import FloatArray, KeyValues
from dpo_rank.scoring.pack import IntArray, Layout, Row

ROLES = ("policy", "reference")
PAIR = "pair"
"""Name of the graph that stands for both roles where they share their bottom layers."""


def feeds(layout: Layout[IntArray], past: FloatArray, keep: IntArray) -> dict[str, npt.NDArray[Any]]:
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
        "prompt_length": named["key_length"] - named["past_length"],  # of the first exported graphs
        "past": past,
        "keep": keep,
    }


def graph_names(directory: Path) -> tuple[str, ...]:
    """The graphs of a directory: one for each role, or one for both."""
    return (PAIR,) if (directory / f"{PAIR}.onnx").is_file() else ROLES


class Graph(Protocol):
    """One exported graph on some runtime."""

    def input_shapes(self) -> Mapping[str, Sequence[Any]]:
        """Shapes of the inputs; an axis without a fixed size is no int."""
        ...

    def run(self, outputs: Sequence[str], inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs asked for."""
        ...


class GraphEngine(abc.ABC):
    """A policy and its reference as exported graphs; a subclass opens them and says ``name``, ``device`` and ``precision``.

    With two threads or more the graphs run side by side, each with half of them: less waiting at the end of every small product
    than one after the other with all. In a forked child the graphs are opened anew: a runtime's threads do not survive a fork.

    Args:
        directory: holds the graphs and their external data.
        threads: of both graphs together.
        side_by_side: False where one graph fills the device, or the runtime takes one request at a time.

    """

    def __init__(self, directory: Path, threads: int, side_by_side: bool = True) -> None:
        self.directory, self.threads = directory, threads
        self._names = graph_names(directory)
        self._parallel = side_by_side and threads >= 2 and len(self._names) == 2
        self._lock = threading.Lock()
        self._start()

    @abc.abstractmethod
    def open_graph(self, role: str, threads: int) -> Graph:
        """The graph of ``"policy"``, ``"reference"`` or ``"pair"``, to run with ``threads``."""

    def _start(self) -> None:
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(len(ROLES), thread_name_prefix="dpo_rank")
        each = self.threads // len(ROLES) if self._parallel else self.threads
        self._graphs = list(self._pool.map(lambda role: self.open_graph(role, each), self._names))
        shapes = self._graphs[0].input_shapes()
        self._inputs = frozenset(shapes)
        self.takes_past = "past" in shapes  # the first exported graphs read whole rows only
        self._nothing = np.zeros((0, *shapes["past"][1:]) if self.takes_past else 0, dtype=np.float32)

    def logps(self, row: Row) -> tuple[FloatArray, FloatArray]:
        """Log-probs in nats of the row's targets under policy and reference, float32 ``[M]`` each."""
        return self._run(row, None, None)

    def memory(self, capacity: int) -> KeyValues:
        """Arrays in float32."""
        return KeyValues(functools.partial(np.empty, dtype=np.float32), capacity)

    def continued(self, row: Row, past: KeyValues, keep: IntArray | None = None) -> tuple[FloatArray, FloatArray]:
        """`logps` of a row behind ``past``; the keys and values of the row's places ``keep`` are appended to ``past``."""
        return self._run(row, past, keep)

    def _run(self, row: Row, past: KeyValues | None, keep: IntArray | None) -> tuple[FloatArray, FloatArray]:
        self._reopen_after_fork()
        before = past.arrays if past is not None and len(past) else [self._nothing] * 2
        places = np.zeros(0, dtype=np.int64) if keep is None else keep
        wanted = ["logps"] if keep is None else ["logps", "kept"]
        if self._names == (PAIR,):
            inputs = feeds(row.layout, before[0], places) | {"past_reference": before[1]}
            outputs = self._graphs[0].run([*wanted, *(f"{name}_reference" for name in wanted)], self._taken(inputs))
            found = [outputs[: len(wanted)], outputs[len(wanted) :]]
        else:
            each = self._pool.map if self._parallel else map
            found = list(each(lambda graph, part: graph.run(wanted, self._taken(feeds(row.layout, part, places))), self._graphs, before))
        if past is not None and keep is not None:
            past.append([kept for _, kept in found])
        policy, reference = (np.asarray(outputs[0], dtype=np.float32) for outputs in found)
        return policy, reference

    def _taken(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Those of ``inputs`` that the graphs have."""
        return {name: inputs[name] for name in self._inputs}

    def _reopen_after_fork(self) -> None:
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid != os.getpid():
                for lost in (*self._graphs, self._pool):
                    # Destroying a session joins its threads, which the fork left behind: it would wait for ever.
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(lost))
                self._start()


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

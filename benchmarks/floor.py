"""The floor: every matrix product that scoring a pair needs, bare, each of its real shape, in the faster of onnxruntime and torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper


def floor(shape: dict[str, Any], prompt: int, lengths: list[int], threads: int) -> dict[str, float]:
    """Seconds of a pair's products: linear layers on the packed row, head on the candidates' places, attention on its causal extent."""
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    dim = shape.get("head_dim", width // heads)
    run, targets = sum(n - 1 for n in lengths), sum(lengths)
    row = prompt + run
    product = _Fastest(threads)
    linear = sum(
        count * product(row, inputs, outputs)
        for count, inputs, outputs in (
            (1, width, heads * dim),
            (2, width, kv_heads * dim),
            (1, heads * dim, width),
            (2, width, inner),
            (1, inner, width),
        )
    )
    # A causal product has half of its square. Measured on the full square, which a runtime runs at its best.
    attention = product(prompt, dim, prompt, heads) / 2 + product(prompt, prompt, dim, heads) / 2
    if run:
        attention += product(run, dim, prompt, heads) + product(run, prompt, dim, heads)
        side = max(8, round((sum((n - 1) ** 2 for n in lengths) / len(lengths)) ** 0.5))
        own = product(side, dim, side, heads * len(lengths)) + product(side, side, dim, heads * len(lengths))
        attention += own / 2
    return {
        "linear": 2 * layers * linear,
        "head": 2 * product(targets, width, shape["vocab_size"]),
        "attention": 2 * layers * attention,
    }


class _Fastest:
    """Median seconds of ``[batch, rows, inner] @ [batch, inner, columns]`` in the faster of both runtimes."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.known: dict[tuple[int, ...], float] = {}
        torch.set_num_threads(threads)

    def __call__(self, rows: int, inner: int, columns: int, batch: int = 1) -> float:
        # The head's output would not fit for long rows: a product of 2,048 rows stands for all of them.
        part = min(rows, max(256, 2**28 // (columns * batch)))
        key = (part, inner, columns, batch)
        if key not in self.known:
            left, right = (
                np.random.default_rng(0).standard_normal(size, dtype=np.float32) for size in ((batch, part, inner), (batch, inner, columns))
            )
            a, b = torch.from_numpy(left), torch.from_numpy(right)
            constant = batch == 1  # a weight, which a runtime may lay out as it likes
            session = _matmul(right[0] if constant else None, self.threads)
            feeds = {"a": left[0] if constant else left} | ({} if constant else {"b": right})
            self.known[key] = min(_median(lambda: torch.matmul(a, b)), _median(lambda: session.run(None, feeds)))
        return self.known[key] * rows / part


def _matmul(weight: np.ndarray | None, threads: int) -> Any:
    rank = 3 if weight is None else 2
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in ("a", "b", "c")]
    constants = [] if weight is None else [helper.make_tensor("b", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])], "product", values[:1] if constants else values[:2], values[2:], constants
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _median(work: Callable[[], Any]) -> float:
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 0.5 and len(seconds) < 15):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]

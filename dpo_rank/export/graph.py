"""The scoring core of one model as an ONNX graph, and other weights put into the same graph.

The graph is traced once. Every weight in it remembers the parameter that it came from and whether it was transposed, so the
reference is written by the very transformation that the policy went through.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim

from dpo_rank.errors import ModelError
from dpo_rank.export.fuse import fuse
from dpo_rank.scoring.engine import FloatArray
from dpo_rank.scoring.graph_engine import feeds
from dpo_rank.scoring.logps import TokenLogProbs, key_value_shape
from dpo_rank.scoring.pack import Group, IntArray, Layout, pack

logger = logging.getLogger(__name__)

WEIGHT, TRANSPOSED = "dpo_rank.weight", "dpo_rank.transposed"
REFUSED = {"gpt_oss": "its expert routing has no exported form yet"}
"""Architectures that score in torch but are not exported, with the reason."""


class _Graph(nn.Module):
    """`TokenLogProbs` with the graph's inputs: prompt and run tokens apart, so that no axis is a sum of two others."""

    def __init__(self, model: TokenLogProbs) -> None:
        super().__init__()
        self.scorer = model

    def forward(
        self,
        prompt_ids: Tensor,
        run_ids: Tensor,
        prompt_positions: Tensor,
        run_positions: Tensor,
        prompt_index: Tensor,
        prompt_slot: Tensor,
        key_index: Tensor,
        key_length: Tensor,
        past_length: Tensor,
        run_index: Tensor,
        run_slot: Tensor,
        own_index: Tensor,
        own_slot: Tensor,
        source: Tensor,
        targets: Tensor,
        past: Tensor,
        keep: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layout = Layout(
            torch.cat([prompt_ids, run_ids]),
            torch.cat([prompt_positions, run_positions]),
            prompt_index,
            prompt_slot,
            key_index,
            key_length,
            past_length,
            run_index,
            run_slot,
            own_index,
            own_slot,
            source,
            targets,
        )
        return self.scorer.continued(layout, past, keep)


_AXES: dict[str, tuple[str, ...]] = {
    "prompt_ids": ("prompt_tokens",),
    "run_ids": ("run_tokens",),
    "prompt_positions": ("prompt_tokens",),
    "run_positions": ("run_tokens",),
    "prompt_index": ("prompts", "prompt_max"),
    "prompt_slot": ("prompt_tokens",),
    "key_index": ("prompts", "key_max"),
    "key_length": ("prompts",),
    "past_length": ("prompts",),
    "run_index": ("prompts", "run_max"),
    "run_slot": ("run_tokens",),
    "own_index": ("candidates", "own_max"),
    "own_slot": ("run_tokens",),
    "source": ("targets",),
    "targets": ("targets",),
    "past": ("past_tokens",),
    "keep": ("kept_tokens",),
}


def trace(model: Any) -> ir.Model:
    """The scoring graph of a transformers model, float32, every axis dynamic.

    Raises:
        ModelError: the architecture cannot be exported; the message says why.

    """
    name = type(model).__name__
    if reason := REFUSED.get(model.config.model_type):
        raise ModelError(f"{name} cannot be exported: {reason}. Ranker.from_models scores it with torch")
    scorer = TokenLogProbs(model)
    if not scorer.packed:
        raise ModelError(f"{name} cannot be exported: {scorer.reason}. Ranker.from_models scores it with torch")
    example, past, keep = _example(model)
    axes = {axis: Dim.DYNAMIC for names in _AXES.values() for axis in names}
    shapes = {name: {place: axes[axis] for place, axis in enumerate(names)} for name, names in _AXES.items()}
    inputs = {name: torch.from_numpy(array) for name, array in feeds(example, past, keep).items() if name in _AXES}
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                _Graph(scorer),
                args=(),
                kwargs=inputs,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=20)
    except Exception as error:  # the exporter raises many kinds of its own
        raise ModelError(f"{name} cannot be exported: {_first_cause(error)}. Ranker.from_models scores it with torch") from error
    assert exported is not None
    graph = exported.model
    for value, axis_names in zip(graph.graph.inputs, _AXES.values(), strict=True):
        fixed = value.shape[len(axis_names) :] if value.shape is not None else ()
        value.shape = ir.Shape([*axis_names, *fixed])
    graph.graph.outputs[0].name, graph.graph.outputs[1].name = "logps", "kept"
    _note_weights(graph, scorer)
    fold_transposes(graph)
    # Of the exporter's optimiser only what shrinks the graph: its pattern rewriter takes longer than all the rest, and the
    # runtime fuses on its own when it loads.
    optimizer.fold_constants(graph, input_size_limit=1024, output_size_limit=1024, should_fold=_reads_no_weight)
    fuse(graph)
    common.CommonSubexpressionEliminationPass()(graph)
    common.RemoveUnusedNodesPass()(graph)
    return graph


def _first_cause(error: BaseException) -> str:
    """One line of the error that the exporter wrapped in its own: that one names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own internals from the user; errors still come as exceptions."""
    remarks = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.setLevel(level)


def _example(model: Any) -> tuple[Layout[IntArray], FloatArray, IntArray]:
    """Sizes of an axis must differ and be at least 2: the exporter takes equal sizes for one axis and 1 for a constant."""
    ids = iter(range(1, 10_000))

    def tokens(count: int) -> list[int]:
        return [next(ids) * 7919 % int(model.config.vocab_size) for _ in range(count)]

    past = key_value_shape(model.config)
    groups = [Group(tokens(11), [tokens(7), tokens(3), tokens(5)], past=range(2)), Group(tokens(6), [tokens(4), tokens(9)], past=range(8))]
    return pack(groups, num_past=8).layout, np.zeros((8, *past), dtype=np.float32), np.arange(10)


def _note_weights(graph: ir.Model, scorer: TokenLogProbs) -> None:
    """Write on every initializer which parameter or buffer of the model it is."""
    names = {**dict(scorer.model.named_parameters(remove_duplicate=False)), **dict(scorer.model.named_buffers(remove_duplicate=False))}
    for value in graph.graph.initializers.values():
        assert value.name is not None
        name = value.name.removeprefix("scorer.model.")
        if name in names:
            value.metadata_props[WEIGHT] = name


def _reads_no_weight(node: ir.Node) -> bool | None:
    """What is computed from a weight stays in the graph, however small: other weights are put in its place later."""
    return False if any(value is not None and WEIGHT in value.metadata_props for value in node.inputs) else None


def fold_transposes(graph: ir.Model) -> None:
    """Store a weight that is only ever read transposed as its transpose; a table that is also read by rows stays as it is."""
    for node in list(graph.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.shape is None or len(source.shape) != 2:
            continue
        if source.is_initializer() and all(use.node.op_type == "Transpose" for use in source.uses()):
            source.const_value = ir.Tensor(np.ascontiguousarray(source.const_value.numpy().T), name=source.name)  # type: ignore[union-attr]
            source.shape = ir.Shape(source.const_value.shape)
            source.metadata_props[TRANSPOSED] = "yes"
            for use in source.uses():
                use.node.outputs[0].replace_all_uses_with(source)
                graph.graph.remove(use.node, safe=True)
        elif is_table(source):
            for product in [reader.node for reader in node.outputs[0].uses()]:
                if product.op_type == "MatMul" and product.inputs[1] is node.outputs[0]:
                    _read_transposed(graph, product, source)


def is_table(value: ir.Value) -> bool:
    """Whether a value is a weight, or some rows of one."""
    cut = value.producer()
    return value.is_initializer() or (
        cut is not None and cut.op_type == "Slice" and cut.inputs[0] is not None and cut.inputs[0].is_initializer()
    )


def _read_transposed(graph: ir.Model, product: ir.Node, table: ir.Value) -> None:
    """``rows [1, M, width] @ table.T`` as a Gemm, which takes the table as an embedding has it."""
    rows, old = product.inputs[0], product.outputs[0]
    if rows is None or rows.shape is None or len(rows.shape) != 3 or rows.shape[0] != 1:
        return
    first = ir.Value(name=f"{table.name}_first_axis", shape=ir.Shape([1]), const_value=ir.tensor(np.zeros(1, dtype=np.int64)))
    first.dtype = ir.DataType.INT64
    graph.graph.initializers[str(first.name)] = first
    flat = ir.node("Squeeze", [rows, first])
    gemm = ir.node("Gemm", [flat.outputs[0], table], {"transB": 1})
    whole = ir.node("Unsqueeze", [gemm.outputs[0], first])
    whole.outputs[0].type, whole.outputs[0].shape = old.type, old.shape
    graph.graph.insert_before(product, [flat, gemm, whole])
    old.replace_all_uses_with(whole.outputs[0])
    graph.graph.remove(product, safe=True)


def with_weights(graph: ir.Model, model: Any) -> ir.Model:
    """A copy of ``graph`` that holds the weights of ``model``, an instance of the same architecture and config."""
    twin = graph.clone()
    weights: Mapping[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for value in twin.graph.initializers.values():
        if (name := value.metadata_props.get(WEIGHT)) is None:
            continue
        array = weights[name].detach().to("cpu", torch.float32 if weights[name].is_floating_point() else None).numpy()
        if TRANSPOSED in value.metadata_props:
            array = np.ascontiguousarray(array.T)
        assert value.const_value is not None
        if tuple(array.shape) != tuple(value.const_value.shape):
            raise ModelError(f"weight {name} has shape {array.shape} in one model and {value.const_value.shape} in the other")
        value.const_value = ir.Tensor(array, name=value.name)
    return twin

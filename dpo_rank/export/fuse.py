"""Patterns of an exported graph that a runtime has one operator for, and copies that nobody needs.

The exporter's own optimiser costs more time than the rest of an export; these few rewrites are what scoring gains from. Each looks for
the nodes that transformers' code is traced to; where a model writes it otherwise the graph stays as it is, and just as right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 23
"""The first with RMSNormalization and RotaryEmbedding."""


def fuse(graph: ir.Model) -> None:
    """Rewrite ``graph`` in place."""
    graph.opset_imports[""] = OPSET
    for node in list(graph.graph):
        if node.op_type == "Slice":
            _drop_whole_slice(node)
        elif node.op_type == "Reciprocal":
            _rms_norm(graph.graph, node)
    for node in list(graph.graph):
        if node.op_type == "Add":
            _rotary(graph.graph, node)
    for node in list(graph.graph):
        if node.op_type == "Transpose":
            _drop_transposes(node)


def _drop_whole_slice(node: ir.Node) -> None:
    """``x[0:]``."""
    starts, ends, _, steps = (_constant(value) for value in [*node.inputs[1:], None, None, None][:4])
    everything = starts is not None and ends is not None and (starts == 0).all() and (ends >= 2**31 - 1).all()
    if everything and (steps is None or (steps == 1).all()):
        _replace(node.outputs[0], _input(node, 0))


def _rms_norm(graph: ir.Graph, reciprocal: ir.Node) -> None:
    """``x * (1 / sqrt(mean(x ** 2) + eps)) * weight`` over the last axis -> RMSNormalization."""
    root = _producer(reciprocal, 0, "Sqrt")
    add = root and _producer(root, 0, "Add")
    mean = add and _producer(add, 0, "ReduceMean")
    power = mean and _producer(mean, 0, "Pow")
    if not (add and mean and power):
        return
    x, epsilon, exponent = _input(power, 0), _constant(add.inputs[1]), _constant(power.inputs[1])
    axes = _constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    scaled = _only_user(reciprocal.outputs[0], "Mul")
    weighted = scaled and _only_user(scaled.outputs[0], "Mul")
    if epsilon is None or exponent is None or exponent != 2 or axes is None or axes.tolist() != [-1] or not (scaled and weighted):
        return
    if x not in scaled.inputs:
        return
    weight = next((value for value in weighted.inputs if value is not scaled.outputs[0]), None)
    if weight is None or weight.shape is None or len(weight.shape) != 1:
        return
    norm = ir.node("RMSNormalization", [x, weight], {"axis": -1, "epsilon": float(epsilon)})
    graph.insert_before(weighted, norm)
    _replace(weighted.outputs[0], norm.outputs[0])


def _rotary(graph: ir.Graph, add: ir.Node) -> None:
    """``x * cos + concat(-x[half:], x[:half]) * sin``, ``x`` [1, heads, T, dim] -> RotaryEmbedding, before a transpose if there is one."""
    straight, turned = _producer(add, 0, "Mul"), _producer(add, 1, "Mul")
    concat = turned and _producer(turned, 0, "Concat")
    negative = concat and _producer(concat, 0, "Neg")
    upper = negative and _producer(negative, 0, "Slice")
    lower = concat and _producer(concat, 1, "Slice")
    if not (straight and turned and upper and lower):
        return
    x = _input(straight, 0)
    if lower.inputs[0] is not x or upper.inputs[0] is not x or x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
        return
    dim = x.shape[3]
    middle, end = _constant(lower.inputs[2]), _constant(upper.inputs[1])
    if middle is None or end is None or middle.tolist() != [dim // 2] or end.tolist() != [dim // 2]:
        return
    made = _Made()
    cos, sin = (made.half(_input(straight, 1), dim), made.half(_input(turned, 1), dim))
    transpose = _producer(straight, 0, "Transpose")
    heads = x.shape[1]
    if transpose is not None and _permutation(transpose) == [0, 2, 1, 3] and isinstance(heads, int):
        # On [1, T, heads * dim], so that what turns the heads to the front meets what turns them back.
        flat = made.node("Reshape", [_input(transpose, 0), made.constant([1, -1, heads * dim])])
        flat = made.node("RotaryEmbedding", [flat, cos, sin], {"num_heads": heads})
        tokens_first = made.node("Reshape", [flat, made.constant([1, -1, heads, dim])])
        result = made.node("Transpose", [tokens_first], {"perm": [0, 2, 1, 3]})
    else:
        result = made.node("RotaryEmbedding", [x, cos, sin])
    graph.insert_before(add, made.nodes)
    _replace(add.outputs[0], result)


class _Made:
    """New nodes, in order."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def node(self, op: str, inputs: Sequence[ir.Value], attributes: dict[str, Any] | None = None) -> ir.Value:
        self.nodes.append(ir.node(op, inputs, attributes or {}))
        return self.nodes[-1].outputs[0]

    def constant(self, values: Sequence[int]) -> ir.Value:
        tensor = ir.tensor(np.array(values, dtype=np.int64))
        value = self.node("Constant", [], {"value": tensor})
        value.const_value = tensor
        return value

    def half(self, value: ir.Value, dim: int) -> ir.Value:
        """``[1, 1, T, dim]`` whose halves are equal -> ``[1, T, dim / 2]``."""
        flat = self.node("Squeeze", [value, self.constant([1])])
        return self.node("Slice", [flat, self.constant([0]), self.constant([dim // 2]), self.constant([2])])


def _drop_transposes(node: ir.Node) -> None:
    """A transpose and its inverse, or one that moves nothing."""
    order = _permutation(node)
    if order == sorted(order):
        _replace(node.outputs[0], _input(node, 0))
        return
    before = _input(node, 0).producer()
    if before is not None and before.op_type == "Transpose":
        first = _permutation(before)
        if [first[place] for place in order] == list(range(len(order))):
            _replace(node.outputs[0], _input(before, 0))


def _permutation(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def _producer(node: ir.Node, place: int, op: str) -> ir.Node | None:
    value = node.inputs[place]
    found = None if value is None else value.producer()
    return found if found is not None and found.op_type == op else None


def _only_user(value: ir.Value, op: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op else None


def _constant(value: ir.Value | None) -> np.ndarray | None:  # type: ignore[type-arg]
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    attribute = next(iter(node.attributes.values()))
    return np.asarray(attribute.as_tensor().numpy() if attribute.name == "value" else attribute.value)


def _replace(old: ir.Value, new: ir.Value) -> None:
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    old.replace_all_uses_with(new)

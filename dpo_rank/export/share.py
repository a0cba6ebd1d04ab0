"""Two graphs of one architecture whose bottom layers are equal, as one graph that computes these layers once.

A pair whose training changed only the top k of L layers then costs 1 + k / L passes, and as many weights. What is shared is found
from the weights: a node of the reference whose inputs are all shared is the policy's node.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from dpo_rank.export.graph import WEIGHT

REFERENCE = "_reference"
"""Suffix of the reference's past and outputs in the graph of a pair."""


def share_trunk(policy: ir.Model, reference: ir.Model) -> ir.Model | None:
    """One graph with the outputs of both, or None where they share no layer, or all.

    Args:
        policy: a traced graph.
        reference: the same graph with other weights.

    """
    shared = shared_layers(policy, reference)
    past = next(value for value in policy.graph.inputs if value.name == "past")
    assert past.shape is not None
    if not 0 < shared < int(past.shape[1]):  # type: ignore[arg-type]
        return None
    pair = policy.clone()
    return pair if _Merge(pair.graph, reference.graph, shared).run() else None


def shared_layers(policy: ir.Model, reference: ir.Model) -> int:
    """How many layers from the bottom have equal weights."""
    changed, known = [], [-1]
    for name, value in policy.graph.initializers.items():
        parameter = value.metadata_props.get(WEIGHT, "")
        layer = re.search(r"\.(\d+)\.", parameter)
        if layer:
            known.append(int(layer[1]))
            if not _equal(value, reference.graph.initializers[name]):
                changed.append(int(layer[1]))
    return min(changed, default=max(known) + 1)


def _equal(ours: ir.Value, theirs: ir.Value) -> bool:
    assert ours.const_value is not None
    assert theirs.const_value is not None
    return np.array_equal(ours.const_value.numpy(), theirs.const_value.numpy())


class _Merge:
    """Adds to the policy's graph what the reference computes otherwise."""

    def __init__(self, graph: ir.Graph, reference: ir.Graph, shared: int) -> None:
        self.graph, self.reference, self.shared = graph, reference, shared
        self.twin: dict[ir.Value, ir.Value] = {}
        self.from_past: set[ir.Value] = set()  # parts of the past of shared layers

    def run(self) -> bool:
        """Whether the shared layers came out shared; if not, the graph is of no use."""
        self._inputs()
        self._weights()
        for ours, theirs in zip(list(self.graph), list(self.reference), strict=True):
            inputs = [None if value is None else self.twin[value] for value in theirs.inputs]
            if self._is_shared(ours, inputs):
                self.twin.update(zip(theirs.outputs, ours.outputs, strict=True))
                if any(value is self.past or value in self.from_past for value in ours.inputs):
                    self.from_past.update(output for output in ours.outputs if ours.op_type != "Concat")
            elif any(value in self.from_past for value in inputs):
                return False  # the policy's past would meet the reference's keys
            else:
                self._copy(theirs, inputs)
        for value in list(self.reference.outputs):
            output = self.twin[value]
            if output in self.graph.outputs:
                return False
            output.name = f"{value.name}{REFERENCE}"
            self.graph.outputs.append(output)
        return True

    def _inputs(self) -> None:
        for ours, theirs in zip(list(self.graph.inputs), self.reference.inputs, strict=True):
            self.twin[theirs] = ours
            if ours.name == "past":
                self.past = ours
                self.other = ir.Value(name=f"past{REFERENCE}", shape=ours.shape, type=ours.type)
                self.twin[theirs] = self.other
        self.graph.inputs.append(self.other)

    def _weights(self) -> None:
        for name, theirs in self.reference.initializers.items():
            ours = self.graph.initializers[name]
            if not _equal(ours, theirs):
                ours = ir.Value(name=f"{name}{REFERENCE}", shape=theirs.shape, type=theirs.type, const_value=theirs.const_value)
                ours.metadata_props.update(theirs.metadata_props)
                self.graph.initializers[str(ours.name)] = ours
            self.twin[theirs] = ours

    def _is_shared(self, ours: ir.Node, inputs: list[ir.Value | None]) -> bool:
        if all(a is b for a, b in zip(ours.inputs, inputs, strict=True)):
            return True
        if not inputs or inputs[0] is not self.other:
            return False
        if ours.op_type == "Shape":
            return True
        layer = _constant(ours.inputs[1]) if ours.op_type == "Gather" else None
        return layer is not None and ours.attributes["axis"].as_int() == 1 and int(layer) < self.shared

    def _copy(self, theirs: ir.Node, inputs: list[ir.Value | None]) -> None:
        node = ir.node(
            theirs.op_type, inputs, {name: attribute.value for name, attribute in theirs.attributes.items()}, domain=theirs.domain,
            num_outputs=len(theirs.outputs),
        )  # fmt: skip
        for new, old in zip(node.outputs, theirs.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            self.twin[old] = new
        self.graph.append(node)


def _constant(value: ir.Value | None) -> np.ndarray | None:  # type: ignore[type-arg]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.numpy().size != 1 else tensor.numpy().reshape(())

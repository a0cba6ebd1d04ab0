"""Lower precisions of an exported graph.

int8: weights are signed 8-bit with a scale per output column; a row of activations is divided by its own absolute maximum
before it is quantised, so a token's result depends on its own row alone and not on what else is in the batch (dynamic
quantisation with one scale per tensor would let candidates change each other's scores).

fp16, for a GPU's execution provider: weights and matrix products in half precision; norms, softmax, log-sum-exp and sums stay in
float32. On a CPU onnxruntime converts back and forth and is slower than in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dpo_rank.export.graph import is_table

MICROSOFT = "com.microsoft"


def int8(graph: ir.Model) -> ir.Model:
    """A copy of ``graph`` with every weight matrix in 8 bits: linear layers, head and embeddings."""
    model = graph.clone()
    model.opset_imports[MICROSOFT] = 1
    _Quantizer(model.graph).run()
    return model


def fp16(graph: ir.Model) -> ir.Model:
    """A copy of ``graph`` with weight matrices and matrix products in half precision, and everything else in float32."""
    model = graph.clone()
    _Halver(model.graph).run()
    return model


PRECISIONS: dict[str, Callable[[ir.Model], ir.Model]] = {"fp32": ir.Model.clone, "fp16": fp16, "int8": int8}
"""What an exported graph can be turned into, by the name of its folder under ``onnx/``."""


class _Rewriter:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.Tensor(array, name=name))
        value.dtype = value.const_value.dtype  # type: ignore[union-attr]
        self.graph.initializers[name] = value
        return value

    def _add(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int] | None = None, domain: str = ""
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes or {}, domain=domain)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        old = node.outputs[0]
        value.type, value.shape = old.type, old.shape
        old.replace_all_uses_with(value)
        self.graph.remove(node, safe=True)

    def _drop_unused(self, weights: Iterable[ir.Value]) -> None:
        """Remove those of ``weights`` that nothing reads any more; rows cut out of a weight stand before it."""
        for weight in sorted(weights, key=ir.Value.is_initializer):
            cut = weight.producer()
            if weight.uses():
                continue
            if cut is not None:
                self.graph.remove(cut, safe=True)
            elif weight.is_initializer():
                self.graph.initializers.pop(str(weight.name))


class _Halver(_Rewriter):
    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self.halves: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type == "Slice" and _is_matrix(node.inputs[0]):
                self.halves[node.outputs[0]] = self._add(node, "Slice", [self._half(node, node.inputs[0]), *node.inputs[1:]])  # type: ignore[arg-type]
                continue
            if node.op_type in ("MatMul", "Gemm"):
                inputs = [None if value is None else self._half(node, value) for value in node.inputs]
            elif node.op_type == "Gather" and _is_matrix(node.inputs[0]):
                inputs = [self._half(node, node.inputs[0]), *node.inputs[1:]]  # type: ignore[arg-type]
            else:
                continue
            twin = ir.node(node.op_type, inputs, {name: attribute.value for name, attribute in node.attributes.items()})
            self.graph.insert_before(node, twin)
            self._replace(node, self._add(node, "Cast", [twin.outputs[0]], {"to": ir.DataType.FLOAT}))
        self._drop_unused([value for value in self.halves if is_table(value)])

    def _half(self, before: ir.Node, value: ir.Value) -> ir.Value:
        if value not in self.halves:
            if value.is_initializer():
                assert value.const_value is not None
                self.halves[value] = self._constant(f"{value.name}_fp16", value.const_value.numpy().astype(np.float16))
            else:
                self.halves[value] = self._add(before, "Cast", [value], {"to": ir.DataType.FLOAT16})
        return self.halves[value]


class _Quantizer(_Rewriter):
    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self.rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.weights: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.step = self._constant("int8_step", np.array(1 / 127, dtype=np.float32))
        self.zero = self._constant("int8_zero", np.array(128, dtype=np.uint8))
        self.tiny = self._constant("int8_tiny", np.array(1e-30, dtype=np.float32))
        self.last = self._constant("int8_last_axis", np.array([-1], dtype=np.int64))

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type == "Slice" and _is_matrix(node.inputs[0]):
                parts = (self._add(node, "Slice", [part, *node.inputs[1:]]) for part in self._quantized(node.inputs[0], axis=1))
                self.weights[node.outputs[0]] = (next(parts), next(parts))
            elif node.op_type == "MatMul" and _is_matrix(node.inputs[1]):
                self._replace(node, self._matmul(node, node.inputs[0], node.inputs[1]))
            elif node.op_type == "Gemm" and (_is_matrix(node.inputs[1]) or node.inputs[1] in self.weights) and _is_plain_gemm(node):
                product = self._matmul(node, node.inputs[0], node.inputs[1], transposed=_is_transposed(node))
                self._replace(node, product if len(node.inputs) == 2 else self._add(node, "Add", [product, node.inputs[2]]))
            elif node.op_type == "Gather" and _is_matrix(node.inputs[0]):
                self._replace(node, self._gather(node))
        self._drop_unused(self.weights)

    def _matmul(self, before: ir.Node, rows: ir.Value, weight: ir.Value, transposed: bool = False) -> ir.Value:
        """``rows @ weight`` (or its transpose) in u8 x s8; rows that feed several products are quantised once."""
        if rows not in self.rows:
            top = self._add(before, "ReduceMax", [self._add(before, "Abs", [rows]), self.last], {"keepdims": 1})
            top = self._add(before, "Max", [top, self.tiny])
            unit = self._add(before, "Mul", [rows, self._add(before, "Reciprocal", [top])])
            self.rows[rows] = self._add(before, "QuantizeLinear", [unit, self.step, self.zero]), top
        quantized, top = self.rows[rows]
        values, scales = self._quantized(weight, axis=1 if transposed else 0)
        if transposed:  # on disk as the embedding has it; a runtime turns a constant once, when it loads
            values = self._add(before, "Transpose", [values])
        product = self._add(before, "MatMulIntegerToFloat", [quantized, values, self.step, scales, self.zero], domain=MICROSOFT)
        return self._add(before, "Mul", [product, top])

    def _gather(self, node: ir.Node) -> ir.Value:
        """Rows of an 8-bit table, each times its own scale."""
        table, ids = node.inputs[0], node.inputs[1]
        values, scales = self._quantized(table, axis=1)
        found = self._add(node, "Cast", [self._add(node, "Gather", [values, ids], {"axis": 0})], {"to": ir.DataType.FLOAT})
        scale = self._add(node, "Unsqueeze", [self._add(node, "Gather", [scales, ids], {"axis": 0}), self.last])
        return self._add(node, "Mul", [found, scale])

    def _quantized(self, weight: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        """8-bit values and the scale of every vector along ``axis``."""
        if weight not in self.weights:
            assert weight.const_value is not None
            array = weight.const_value.numpy()
            scales = np.maximum(np.abs(array).max(axis=axis), 1e-30).astype(np.float32) / np.float32(127)
            values = np.rint(array / np.expand_dims(scales, axis)).astype(np.int8)
            self.weights[weight] = (
                self._constant(f"{weight.name}_int8", values),
                self._constant(f"{weight.name}_scale", scales),
            )
        return self.weights[weight]


def _is_matrix(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and value.shape is not None
        and len(value.shape) == 2
        and value.dtype == ir.DataType.FLOAT
    )


def _is_plain_gemm(node: ir.Node) -> bool:
    defaults = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return all(node.attributes[name].value == value for name, value in defaults.items() if name in node.attributes)


def _is_transposed(gemm: ir.Node) -> bool:
    return "transB" in gemm.attributes and bool(gemm.attributes["transB"].as_int())

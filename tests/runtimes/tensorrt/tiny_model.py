"""A tiny model that keeps the engine graph's contract, as ONNX and as float32 numpy over a whole sequence.

x = embedding + position; attention; optionally a recurrent layer (state' = decay * state + k v^T); head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCAB, HIDDEN, HEADS, KV_HEADS, SIZE = 61, 32, 4, 2, 16
CAPACITY, CHUNK = 64, 8
DECAY = 0.75
ARRAY = npt.NDArray[np.float32]


class TinyModel:
    """Seeded weights, float16 values.

    Args:
        form: "rows_out" or "in_place". recurrent: a second layer with a state.
        host_embedding: the engine takes rows; else ids.
        hidden: columns of the embedding; large ones make weights that can become inputs.
    """

    def __init__(
        self,
        form: str = "rows_out",
        *,
        recurrent: bool = False,
        host_embedding: bool = True,
        hidden: int = HIDDEN,
        capacity: int = CAPACITY,
    ) -> None:
        self.form, self.recurrent, self.host_embedding = form, recurrent, host_embedding
        self.hidden, self.capacity = hidden, capacity
        rng = np.random.default_rng(5)

        def matrix(rows: int, columns: int, factor: float = 1.0) -> ARRAY:
            values = rng.standard_normal((rows, columns)) * factor * 1.5 / np.sqrt(rows)
            rounded: ARRAY = values.astype(np.float16).astype(np.float32)
            return rounded

        self.weights: dict[str, ARRAY] = {
            "embedding": matrix(VOCAB, hidden, 8),
            "positions": matrix(capacity, hidden),
            "q": matrix(hidden, HEADS * SIZE),
            "k": matrix(hidden, KV_HEADS * SIZE),
            "v": matrix(hidden, KV_HEADS * SIZE),
            "o": matrix(HEADS * SIZE, hidden),
            "rq": matrix(hidden, SIZE, 1 / 8),
            "rk": matrix(hidden, SIZE, 1 / 8),
            "rv": matrix(hidden, SIZE),
            "ro": matrix(SIZE, hidden),
            "head": matrix(hidden, VOCAB),
        }

    def logits(self, tokens: list[int]) -> ARRAY:
        """float32 (T, vocab) by plain float32 arithmetic without any cache."""
        w, count = self.weights, len(tokens)
        x = w["embedding"][tokens] + w["positions"][:count]
        q = (x @ w["q"]).reshape(count, KV_HEADS, HEADS // KV_HEADS, SIZE)
        k = (x @ w["k"]).reshape(count, KV_HEADS, SIZE)
        v = (x @ w["v"]).reshape(count, KV_HEADS, SIZE)
        scores = np.einsum("thgd,shd->hgts", q, k) / np.sqrt(SIZE)
        scores += np.triu(np.full((count, count), -np.inf, np.float32), 1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hgts,shd->thgd", p, v).reshape(count, -1) @ w["o"]
        if self.recurrent:
            x = x + self.recurrence(x)[0] @ w["ro"]
        result: ARRAY = x @ w["head"]
        return result

    def recurrence(self, x: ARRAY) -> tuple[ARRAY, ARRAY]:
        w = self.weights
        state = np.zeros((SIZE, SIZE), np.float32)
        rows = []
        for row in x:
            state = DECAY * state + np.outer(row @ w["rk"], row @ w["rv"])
            rows.append((row @ w["rq"]) @ state)
        return np.stack(rows), state

    def save(self, folder: Path) -> None:
        """model.onnx, model.onnx.data (every matrix of the graph) and embedding.bin."""
        onnx.save_model(
            self.onnx(),
            str(folder / "model.onnx"),
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=256,
        )
        if self.host_embedding:
            (folder / "embedding.bin").write_bytes(self.weights["embedding"].astype("<f2").tobytes())

    def onnx(self) -> onnx.ModelProto:
        graph = _Graph(self)
        return graph.model()


class _Graph:
    def __init__(self, tiny: TinyModel) -> None:
        self.tiny = tiny
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.count = 0

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        self.count += 1
        name = out or f"{kind}_{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: npt.DTypeLike) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype)
        return name

    def weight(self, name: str) -> str:
        self.constants[name] = self.tiny.weights[name].astype(np.float16)
        return name

    def input(self, name: str, kind: int, shape: list[Any]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: list[Any]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def model(self) -> onnx.ModelProto:
        tiny = self.tiny
        past = self.input("past_length", TensorProto.INT32, [1])
        if tiny.host_embedding:
            x = self.input("inputs_embeds", TensorProto.FLOAT16, [1, "T", tiny.hidden])
            count = self.op("Gather", self.op("Shape", x), self.constant(1, np.int64))
        else:
            ids = self.input("input_ids", TensorProto.INT32, [1, "T"])
            count = self.op("Gather", self.op("Shape", ids), self.constant(1, np.int64))
            x = self.op("Gather", self.weight("embedding"), ids)
        zero, one = self.constant(0, np.int32), self.constant(1, np.int32)
        steps = self.op("Range", zero, self.op("Cast", count, to=TensorProto.INT32), one)
        positions = self.op("Add", steps, past)
        x = self.op("Add", x, self.op("Gather", self.weight("positions"), positions))
        x = self.op("Add", x, self.attention(x, steps, positions, past))
        if tiny.recurrent:
            x = self.op("Add", x, self.recurrent(x, steps, count))
        rows = self.input("logit_rows", TensorProto.INT32, ["R"])
        logits = self.op("MatMul", self.op("Gather", x, rows, axis=1), self.weight("head"))
        self.op("Cast", logits, out="logits", to=TensorProto.FLOAT)
        self.output("logits", TensorProto.FLOAT, [1, "R", VOCAB])
        tensors = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def heads(self, x: str, weight: str, heads: int) -> str:
        rows = self.op("MatMul", x, self.weight(weight))
        split = self.op("Reshape", rows, self.constant([0, 0, heads, SIZE], np.int64))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def attention(self, x: str, steps: str, positions: str, past: str) -> str:
        kv = [1, KV_HEADS, self.tiny.capacity, SIZE]
        key, value = (self.heads(x, name, KV_HEADS) for name in "kv")
        for port in ("key", "value"):
            self.input(f"past_key_values.0.{port}", TensorProto.FLOAT16, kv)
        if self.tiny.form == "rows_out":
            keys, values, visible = self.rows_out(key, value, steps, past)
        else:
            keys, values, visible = self.in_place(key, value, positions, kv)
        query = self.op(
            "Reshape", self.heads(x, "q", HEADS), self.constant([0, KV_HEADS, 2, -1, SIZE], np.int64)
        )
        unsqueeze = self.constant([2], np.int64)
        keys = self.op("Unsqueeze", self.op("Transpose", keys, perm=[0, 1, 3, 2]), unsqueeze)
        scores = self.op("MatMul", query, keys)
        scores = self.op("Mul", scores, self.constant(SIZE**-0.5, np.float16))
        scores = self.op("Where", visible, scores, self.constant(-6e4, np.float16))
        mixed = self.op(
            "MatMul", self.op("Softmax", scores, axis=-1), self.op("Unsqueeze", values, unsqueeze)
        )
        merged = self.op("Reshape", mixed, self.constant([1, HEADS, -1, SIZE], np.int64))
        rows = self.op("Transpose", merged, perm=[0, 2, 1, 3])
        return self.op(
            "MatMul",
            self.op("Reshape", rows, self.constant([0, 0, HEADS * SIZE], np.int64)),
            self.weight("o"),
        )

    def rows_out(self, key: str, value: str, steps: str, past: str) -> tuple[str, str, str]:
        joined = []
        for port, rows in (("key", key), ("value", value)):
            self.op("Identity", rows, out=f"new.0.{port}")
            self.output(f"new.0.{port}", TensorProto.FLOAT16, [1, KV_HEADS, "T", SIZE])
            joined.append(self.op("Concat", f"past_key_values.0.{port}", rows, axis=2))
        column = self.op("Unsqueeze", steps, self.constant([1], np.int64))  # (T, 1)
        cached = self.op("Less", self.constant(np.arange(self.tiny.capacity), np.int32), past)  # (C,)
        grid = self.op("Mul", column, self.constant(np.zeros((1, self.tiny.capacity)), np.int32))
        cached = self.op("And", cached, self.op("Equal", grid, self.constant(0, np.int32)))
        row = self.op("Unsqueeze", steps, self.constant([0], np.int64))
        new = self.op("LessOrEqual", row, column)
        return joined[0], joined[1], self.op("Concat", cached, new, axis=1)

    def in_place(self, key: str, value: str, positions: str, kv: list[int]) -> tuple[str, str, str]:
        written = []
        column = self.op("Unsqueeze", positions, self.constant([1], np.int64))
        for port, rows in (("key", key), ("value", value)):
            name = f"past_key_values.0.{port}"
            # ScatterND along the rows: capacity first, then back.
            by_row = self.op("Transpose", name, perm=[2, 0, 1, 3])
            new = self.op("Transpose", rows, perm=[2, 0, 1, 3])
            where = self.op("Cast", column, to=TensorProto.INT64)
            full = self.op("ScatterND", by_row, where, new)
            written.append(self.op("Transpose", full, perm=[1, 2, 0, 3], out=f"present.0.{port}"))
            self.output(f"present.0.{port}", TensorProto.FLOAT16, kv)
        cached = self.constant(np.arange(self.tiny.capacity), np.int32)
        return written[0], written[1], self.op("LessOrEqual", cached, column)

    def recurrent(self, x: str, steps: str, count: str) -> str:
        state = self.input("past_key_values.1.recurrent_state", TensorProto.FLOAT, [1, 1, SIZE, SIZE])
        wide = {
            name: self.op("Cast", self.heads(x, name, 1), to=TensorProto.FLOAT) for name in ("rq", "rk", "rv")
        }
        power = self.op("Cast", steps, to=TensorProto.FLOAT)  # t = 0..T-1
        decay = self.constant(DECAY, np.float32)
        column = self.op("Unsqueeze", power, self.constant([1], np.int64))
        row = self.op("Unsqueeze", power, self.constant([0], np.int64))
        distance = self.op("Sub", column, row)
        lower = self.op("GreaterOrEqual", distance, self.constant(0, np.float32))
        weights = self.op("Where", lower, self.op("Pow", decay, distance), self.constant(0, np.float32))
        scores = self.op("MatMul", wide["rq"], self.op("Transpose", wide["rk"], perm=[0, 1, 3, 2]))
        inside = self.op("MatMul", self.op("Mul", scores, weights), wide["rv"])
        later = self.op("Add", column, self.constant(1, np.float32))
        before = self.op("Mul", self.op("MatMul", wide["rq"], state), self.op("Pow", decay, later))
        mixed = self.op("Add", inside, before)
        total = self.op("Cast", count, to=TensorProto.FLOAT)
        left = self.op("Sub", self.op("Sub", total, self.constant(1, np.float32)), column)
        keys = self.op("Mul", wide["rk"], self.op("Pow", decay, left))
        update = self.op("MatMul", self.op("Transpose", keys, perm=[0, 1, 3, 2]), wide["rv"])
        kept = self.op("Mul", state, self.op("Pow", decay, total))
        self.op("Add", kept, update, out="present.1.recurrent_state")
        self.output("present.1.recurrent_state", TensorProto.FLOAT, [1, 1, SIZE, SIZE])
        rows = self.op(
            "Cast", self.op("Squeeze", mixed, self.constant([1], np.int64)), to=TensorProto.FLOAT16
        )
        return self.op("MatMul", rows, self.weight("ro"))

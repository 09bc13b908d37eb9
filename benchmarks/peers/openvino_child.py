"""Measures a stateful OpenVINO language model; run by path, with nothing but numpy and openvino installed.

    python openvino_child.py '{"model": "openvino_model.xml", "threads": 2, "vocab_size": 32000}'

Prints one JSON line when the model is ready, then answers each line of stdin with another:
{"do": "prefill", "tokens": 512} and {"do": "decode", "context": 256, "new_tokens": 32} give {"rate": ...}.
Logits are computed for the last token only, as OpenVINO GenAI arranges it too.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

CHUNK = 512


class Sequence:
    """One infer request and the number of tokens in its state."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.inputs = {port.get_any_name() for port in compiled.inputs}
        self.position = 0

    def feed(self, tokens: Any) -> None:
        """Append tokens (T,) and compute the last one's logits."""
        count = len(tokens)
        values = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, self.position + count), np.int64),
            "position_ids": np.arange(self.position, self.position + count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: values[name] for name in self.inputs})
        self.position += count

    def rewind(self, position: int) -> None:
        """Keep the first ``position`` rows of every state, (batch, heads, rows, size)."""
        for state in self.request.query_state():
            rows = state.state.data
            state.state = ov.Tensor(np.ascontiguousarray(rows[:, :, :position]))
        self.position = position

    def reset(self) -> None:
        self.request.reset_state()
        self.position = 0


def compile_model(path: str, threads: int) -> Any:
    """The compiled model, with the head applied to the last position only."""
    core = ov.Core()
    model = core.read_model(path)
    product = model.output("logits").get_node().input_value(0).get_node()
    if product.get_type_name() == "MatMul":
        hidden = product.input_value(0)
        last = ops.gather(hidden, np.array([-1], np.int64), np.array(1, np.int64))
        product.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", options)


class Measurer:
    """Answers requests; sequences that were prefilled for decoding are kept."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.compiled = compile_model(settings["model"], settings["threads"])
        self.vocab_size = settings["vocab_size"]
        self.fresh: Sequence | None = None
        self.filled: dict[int, Sequence] = {}

    def prompt(self, count: int) -> Any:
        return np.random.default_rng(0).integers(3, self.vocab_size, count)

    def prefill(self, tokens: int) -> float:
        prompt = self.prompt(tokens)
        if self.fresh is None:
            self.fresh = Sequence(self.compiled)
            self.fresh.feed(prompt)
        self.fresh.reset()
        start = time.perf_counter()
        self.fresh.feed(prompt)
        return tokens / (time.perf_counter() - start)

    def decode(self, context: int, new_tokens: int) -> float:
        sequence = self.filled.get(context)
        if sequence is None:
            sequence = self.filled[context] = Sequence(self.compiled)
            prompt = self.prompt(context)
            for start in range(0, context, CHUNK):
                sequence.feed(prompt[start : start + CHUNK])
        sequence.feed(np.array([3]))
        sequence.rewind(context)
        begin = time.perf_counter()
        for token in range(new_tokens):
            sequence.feed(np.array([3 + token % 64]))
        seconds = time.perf_counter() - begin
        sequence.rewind(context)
        return new_tokens / seconds


def main() -> None:
    measurer = Measurer(json.loads(sys.argv[1]))
    print(json.dumps({"version": ov.get_version()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        is_prefill = request.pop("do") == "prefill"
        rate = measurer.prefill(**request) if is_prefill else measurer.decode(**request)
        print(json.dumps({"rate": rate}), flush=True)


if __name__ == "__main__":
    main()

"""The op in torch: eager against the reference, one node when exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cpm_edge.exporter.ops.linear_attention import linear_attention
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from tests.plugins.linear_attention.cases import STRONGEST, WEAKEST, Array, Op, make_case, make_spec


def eager_op(spec: LinearAttentionSpec) -> Op:
    def run(*inputs: Array) -> Sequence[Array]:
        tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in inputs)
        return [tensor.numpy() for tensor in linear_attention(*tensors, spec=spec)]

    return run


@pytest.mark.parametrize("chunks", [[196], [1, 1, 63, 64, 65, 1, 1], [1] * 196])
def test_odd_chunks_and_single_steps(chunks: list[int]) -> None:
    case = make_case(196, 3, 16, 24, batch=2)
    case.check(*case.feed(eager_op(case.spec), chunks))


def test_strong_and_weak_decay_over_a_thousand_rows() -> None:
    spec = LinearAttentionSpec((STRONGEST, WEAKEST, 0.0, -30.0), 0.25)
    case = make_case(1000, 4, 16, spec=spec)
    case.check(*eager_op(spec)(*case.inputs))


def test_it_is_one_node_when_exported() -> None:
    spec = make_spec(4, 8)

    class Attention(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return linear_attention(*inputs, spec=spec)

    inputs = (*(torch.zeros(1, 3, width) for width in (32, 32, 48)), torch.zeros(1, 4, 8, 12))
    program = torch.export.export(Attention(), inputs)
    outputs = program.graph.output_node().args[0]
    assert [tuple(v.meta["val"].shape) for v in outputs] == [(1, 3, 48), (1, 4, 8, 12)]
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert len([node for node in calls if "symbolic" in str(node.target)]) == 1

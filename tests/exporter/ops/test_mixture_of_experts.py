"""The op in torch: eager against its definition, one node when exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpm_edge.exporter.ops.mixture_of_experts import mixture_of_experts
from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec
from tests.plugins.mixture_of_experts.cases import make_case


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 3), (4, 1), (3, 3)])
def test_it_is_the_definition(experts: int, top_k: int) -> None:
    case = make_case(experts, top_k, 21, batch=2)
    x, logits = torch.from_numpy(case.x), torch.from_numpy(case.logits)
    weights = [[torch.from_numpy(weight) for weight in part] for part in case.weights]
    got = mixture_of_experts(x, logits, *weights, spec=case.spec)
    np.testing.assert_allclose(got.numpy(), case.expected(), atol=2e-6)


def test_it_is_one_node_when_exported() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Any, logits: Any, *weights: Any) -> Any:
            return mixture_of_experts(
                x, logits, weights[:3], weights[3:6], weights[6:], spec=MixtureOfExpertsSpec(3, 2)
            )

    weights = [torch.zeros(shape) for shape in [(12, 8)] * 6 + [(8, 12)] * 3]
    program = torch.export.export(Layer(), (torch.zeros(1, 4, 8), torch.zeros(1, 4, 3), *weights))
    (output,) = program.graph.output_node().args[0]
    assert tuple(output.meta["val"].shape) == (1, 4, 8)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert len(calls) == 1 and "symbolic" in str(calls[0].target)

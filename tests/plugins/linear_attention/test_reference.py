from __future__ import annotations

import numpy as np
import pytest

from cpm_edge.plugins.linear_attention.reference import linear_attention
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from tests.plugins.linear_attention.cases import Array, make_case
from tests.plugins.linear_attention.engines import onnxruntime_op


def test_every_token_is_a_weighted_sum_of_values() -> None:
    """o_i = scale * (sum over j <= i of e^{g (i - j)} (q_i . k_j) v_j + e^{g (i + 1)} q_i^T old state)."""
    case = make_case(9, 2, 4, 3)
    query, key, value = (
        array[0].reshape(9, 2, -1).astype(np.float64).swapaxes(0, 1) for array in case.inputs[:3]
    )
    decay = np.array(case.spec.decay)[:, None, None]
    distance = np.arange(9)[:, None] - np.arange(9)
    weights = np.where(distance >= 0, np.exp(decay * np.maximum(distance, 0)), 0)
    past = np.exp(decay * np.arange(1, 10)[:, None]) * (query @ case.inputs[3][0])
    expected = 0.5 * ((query @ key.swapaxes(1, 2) * weights) @ value + past)
    np.testing.assert_allclose(case.output, expected.swapaxes(0, 1).reshape(1, 9, 6), rtol=1e-6, atol=1e-6)


def test_without_decay_the_state_sums_up() -> None:
    case = make_case(5, 1, 2, spec=LinearAttentionSpec((0.0,), 1.0))
    key, value, past = (array[0].astype(np.float64) for array in case.inputs[1:])
    np.testing.assert_allclose(case.state[0, 0], past[0] + key.T @ value, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_precision_is_that_of_the_inputs(dtype: type) -> None:
    case = make_case(3, 2, 4)
    inputs: list[Array] = [array.astype(dtype) for array in case.inputs]
    before = inputs[3].copy()
    output, state = linear_attention(*inputs, spec=case.spec)
    assert output.dtype == state.dtype == dtype
    np.testing.assert_array_equal(inputs[3], before)


@pytest.mark.parametrize("sizes", [(8, 8), (16, 24)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 65])
def test_onnxruntime_s_op_has_the_same_contract(rows: int, sizes: tuple[int, int]) -> None:
    """com.microsoft LinearAttention with the same inputs and the decay repeated for every row."""
    case = make_case(rows, 3, *sizes, batch=2)
    run = onnxruntime_op(case.spec)
    case.check(*run(*case.inputs))

    def op(*inputs: Array) -> list[Array]:
        return list(linear_attention(*inputs, spec=case.spec))

    case.check(*case.feed(op, [1, rows - 1] if rows > 1 else [1]))

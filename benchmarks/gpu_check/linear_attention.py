"""Linear attention beside the same chunked formula in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cpm_edge.benchmarks.gpu_check.case import Array, Call, Case, Empty, worst
from cpm_edge.benchmarks.kernels.linear_attention import sala_spec
from cpm_edge.plugins.linear_attention.launches import CHUNK, linear_attention_plan
from cpm_edge.plugins.linear_attention.reference import linear_attention
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec

Inputs = tuple[Array, Array, Array, Array]
PEER_CHUNK = 64
# Relative errors: of a float32 exponential on a GPU (ex2.approx, 2 units, and its argument), of a
# sum of up to 256 float32 products, and of two float16 parts. tf32 operands are rounded to 11 bits.
EXP, SUM, PARTS, TF32 = 2.0**-21, 2.0**-20, 2.0**-22, 2.0**-11


def cases(heads: int, size: int, row_counts: Sequence[int]) -> Iterator[Case]:
    """SALA's decays, for each number of rows."""
    for rows in row_counts:
        yield linear_attention_case(sala_spec(heads, size), size, rows)


def linear_attention_case(spec: LinearAttentionSpec, size: int, rows: int) -> Case:
    """Random rows and state."""
    heads, width = spec.num_heads, spec.num_heads * size
    inputs = draw(rows, heads, size, size)
    chunks = -(-rows // CHUNK)
    return Case(
        op="linear attention",
        name=f"{heads} heads of {size}",
        rows=rows,
        plan=linear_attention_plan(spec, size, size),
        inputs=[*inputs, np.asarray(spec.decay, np.float32)],
        outputs=[Empty((1, rows, width), torch.float32), 3],
        error=lambda outputs: error(spec, inputs, outputs, chunks),
        bytes=2 * inputs[3].nbytes + rows * width * (3 * 2 + 4),
        operations=4 * rows * heads * size * size,
        peer="torch, float32" if rows == 1 else f"torch, chunks of {PEER_CHUNK}",
        make_peer=lambda device: _peer(spec, inputs, device),
    )


def draw(rows: int, heads: int, size: int, value_size: int, seed: int = 0) -> Inputs:
    """float16 rows and a float32 state, normal."""
    rng = np.random.default_rng(seed)
    widths = [heads * size, heads * size, heads * value_size]
    query, key, value = (rng.standard_normal((1, rows, width)).astype(np.float16) for width in widths)
    return query, key, value, rng.standard_normal((1, heads, size, value_size)).astype(np.float32)


def error(spec: LinearAttentionSpec, inputs: Inputs, got: Sequence[Array], chunks: int) -> float:
    """Of output and state, as a share of their bounds; the largest of the two."""
    query, key, value, past = (each.astype(np.float64) for each in inputs)
    expected = linear_attention(query, key, value, past, spec=spec)
    return float(np.max([*map(worst, got, expected, bounds(spec, inputs, chunks))]))  # NaN stays


def bounds(spec: LinearAttentionSpec, inputs: Inputs, chunks: int) -> tuple[Array, Array]:
    """How far output and state may be off: the recurrence of absolute values times the relative errors above.

    An error in a state decays like the state. A single row is computed without tf32.
    """
    query, key, value, past = (np.abs(each.astype(np.float64)) for each in inputs)
    output, state = linear_attention(query, key, value, past, spec=spec)
    of_state = chunks * (EXP + SUM) + EXP + PARTS
    # 2^-24: what the low parts lose below float16's smallest number, at most once a row.
    of_low = 2.0**-24 * linear_attention(query, np.ones_like(key), value, 0 * past, spec=spec)[1]
    of_output = (TF32 if query.shape[1] > 1 else 0) + of_state + EXP + 2 * SUM
    return of_output * output, of_state * state + of_low


def torch_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunked formula without scale: (heads, T, D) rows of float32 and a state (heads, D, Dv)."""
    outputs = []
    for start in range(0, query.shape[1], PEER_CHUNK):
        q, k, v = (each[:, start : start + PEER_CHUNK] for each in (query, key, value))
        step = torch.arange(q.shape[1], device=q.device)
        distance = step[:, None] - step
        within = torch.exp(decay[:, None, None] * distance.clamp(min=0)).masked_fill(distance < 0, 0)
        from_start = torch.exp(decay[:, None] * (step + 1))[:, :, None]
        outputs.append((q @ k.mT * within) @ v + from_start * (q @ state))
        to_end = torch.exp(decay[:, None] * (len(step) - 1 - step))[:, :, None]
        state = torch.exp(decay * len(step))[:, None, None] * state + (k * to_end).mT @ v
    return torch.cat(outputs, 1), state


def _peer(spec: LinearAttentionSpec, inputs: Inputs, device: torch.device) -> Call:
    heads = spec.num_heads
    rows = [torch.from_numpy(each).to(device) for each in inputs[:3]]
    state = torch.from_numpy(inputs[3][0]).to(device)
    decay = torch.tensor(spec.decay, device=device)

    def run() -> object:
        query, key, value = (each[0].view(each.shape[1], heads, -1).transpose(0, 1).float() for each in rows)
        return torch_linear_attention(query, key, value, state, decay)

    return run

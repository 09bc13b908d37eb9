"""Cases of every op on CPU tensors, where Triton interprets; ``test_gpu_check.py`` runs this in a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.gpu_check import attention, linear_attention, matmul
from cpm_edge.benchmarks.gpu_check.card import Card
from cpm_edge.benchmarks.gpu_check.case import Case, Loaded, worst
from cpm_edge.benchmarks.gpu_check.report import publish
from cpm_edge.benchmarks.gpu_check.run import Settings, cases, check
from cpm_edge.benchmarks.kernels.linear_attention import sala_spec
from cpm_edge.benchmarks.kernels.matmul import Format
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.benchmarks.shapes import TINY
from tests.plugins.sparse_attention.cases import small_spec
from tests.support import interpreter  # noqa: F401  (models tensor cores)

CPU = torch.device("cpu")
CARD = Card("Test card", 87, 200e9, 40e12)
SETTINGS = Settings(("matmul", "attention", "linear-attention"), (1, 19), (64,), 2, 16)
DENSE = SparseAttentionSpec.dense(4, 2, 0.25)
SPARSE = small_spec(4, 2, dense_len=48, window_size=16)


def one(found: object) -> Case:
    return next(iter(found))  # type: ignore[call-overload, no-any-return]


MAKERS: dict[str, Callable[[], Case]] = {
    "int4": lambda: one(matmul.matmul_cases("down", 77, 128, Format(4, 64, symmetric=False), [3])),
    "int8": lambda: one(matmul.matmul_cases("head", 77, 48, Format(8, 0), [19])),
    "dense decode": lambda: attention.attention_case(DENSE, 16, 70, 1),
    "dense prefill": lambda: attention.attention_case(DENSE, 16, 70, 19),
    "sparse decode": lambda: attention.attention_case(SPARSE, 16, 150, 1),
    "sparse prefill": lambda: attention.attention_case(SPARSE, 16, 150, 19),
    "linear decode": lambda: linear_attention.linear_attention_case(sala_spec(2, 16), 16, 1),
    "linear prefill": lambda: linear_attention.linear_attention_case(sala_spec(2, 16), 16, 40),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_plan_is_right_and_what_is_wrong_is_seen(name: str) -> None:
    loaded = Loaded.onto(MAKERS[name](), CPU)
    outcome = loaded.check()
    assert outcome.is_right and outcome.error > 0
    got = loaded.outputs[0].numpy()
    spread = got.astype(np.float64).std()
    for change in (np.nan, 0.05 * spread):
        changed = got.copy()
        changed[..., -1, 3] += np.asarray(change, got.dtype)
        rest = [each.numpy() for each in loaded.outputs[1:]]
        assert not loaded.case.error([changed, *rest]) <= 1


@pytest.mark.parametrize("name", MAKERS)
def test_the_peer_computes_the_same(name: str) -> None:
    """Where it is the same: SDPA is dense."""
    case = MAKERS[name]()
    expected = Loaded.onto(case, CPU)
    expected.run()
    got = case.make_peer(CPU)()
    if case.op == "linear attention":
        output, state = (each.numpy() for each in got)  # type: ignore[attr-defined]
        rows = case.rows
        assert np.abs(expected.outputs[1][0].numpy() - state).max() < 1e-4
        scaled = output.swapaxes(0, 1).reshape(1, rows, -1) / 4
        assert np.abs(expected.outputs[0].numpy() - scaled).max() < 2e-2
    elif case.op == "attention" and "dense" in case.name:
        output = got.transpose(1, 2).reshape(1, case.rows, -1)  # type: ignore[attr-defined]
        assert (expected.outputs[0] - output).abs().max() < 2e-3
    elif case.op == "matmul":
        ours, theirs = expected.outputs[0].float(), got.float()  # type: ignore[attr-defined]
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()


def test_every_op_of_a_model_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = Shape("tiny", TINY)
    found = [case for case in cases(shape, SETTINGS) if not case.name.startswith(("o ", "gate", "down"))]
    assert {case.op for case in found} == {"matmul", "attention", "linear attention"}
    times = iter([1e-3, 2e-3] * len(found))
    outcomes = check(iter(found), CPU, lambda run: (run(), next(times))[1], Progress())
    text, data = tmp_path / "gpu.md", tmp_path / "gpu.json"
    publish(CARD, shape, SETTINGS, outcomes, text, data)
    lines = text.read_text().splitlines()
    assert lines[0].startswith("Test card (sm_87): 200 GB/s from memory, 40 TFLOP/s of float16; torch ")
    assert len(lines) == 4 + len(found) and len({line.count("|") for line in lines[2:]}) == 1
    assert all(line.endswith("| 2000.0 | 2.00 |") for line in lines[4:])
    assert text.read_text() in capsys.readouterr().out
    written = json.loads(data.read_text())
    assert written["results"]["card"]["name"] == "Test card"
    assert [each["seconds"] for each in written["results"]["cases"]] == [1e-3] * len(found)
    assert written["results"]["cases"][0]["kernels"] == ["nbits_int4_g128_8x16"]


def test_a_wrong_result_is_an_error_and_is_not_measured(tmp_path: Path) -> None:
    case = replace(MAKERS["int8"](), error=lambda outputs: worst(outputs[0], outputs[0] + 1, np.array(0.1)))
    outcomes = check(iter([case]), CPU, lambda run: pytest.fail("measured"), Progress())
    text = tmp_path / "gpu.md"
    with pytest.raises(BenchError, match=r"got 1 of 1 beyond it, the first one matmul: head 77 x 48"):
        publish(CARD, Shape("tiny", TINY), SETTINGS, outcomes, text, None)
    assert "| WRONG: 10." in text.read_text()

"""Every method on a tiny checkpoint of every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tokenizers

from cpm_edge.exporter.calibration import gather
from cpm_edge.exporter.calibration.store import CalibratedStore
from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.errors import ExportError, ExportWarning
from cpm_edge.exporter.verify import TEXT
from cpm_edge.exporter.weights import tensor_class
from cpm_edge.quant import TensorClass, quantize_int4
from cpm_edge.quant.hessian import Hessian
from tests.exporter.calibration.conftest import Bench, Outcome
from tests.support.checkpoints import prompt

# One of each kind of attention and MLP; MiniCPM3, SALA and MoE have sites of their own.
VARIANTS = ("llama", "tied-mha", "minicpm3", "moe", "fatrelu", "sala", "sparse-group3", "sala-dense")
METHODS = ("awq", "gptq", "gptq+awq")
IDS = prompt(200).tolist()


def text_ids(checkpoint: Checkpoint) -> list[int]:
    """Tokens of the text that verification uses."""
    path = checkpoint.assets()["tokenizer.json"]
    assert isinstance(path, Path)
    ids: list[int] = tokenizers.Tokenizer.from_file(str(path)).encode(TEXT).ids
    return ids


def mean_error(outcome: Outcome) -> float:
    return float(np.mean([error for layer in outcome.layers() for error in layer.factors.errors.values()]))


def divergence(expected: Any, got: Any) -> float:
    """Mean KL of two sets of logits."""
    p, q = (logits - np.log(np.exp(logits).sum(1, keepdims=True)) for logits in (expected, got))
    return float((np.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_better_than_rounded(bench: Bench, variant: str, method: str) -> None:
    outcome = bench.outcome(variant, method=method)
    assert mean_error(outcome) < 0.8 * mean_error(bench.outcome(variant, method="rtn"))
    linear = {
        name
        for name, info in outcome.source.tensors.items()
        if tensor_class(name, len(info.shape)) is TensorClass.LINEAR
    }
    assert set(outcome.result.store.packed) == linear
    # P-GPTQ for the architectures of MiniCPM alone.
    assert outcome.result.record["skipped"] == (0 if outcome.plan.architecture.name == "llama" else 4)


@pytest.mark.parametrize("variant", ["llama", "minicpm3", "moe", "sala"])
def test_the_model_is_nearer_to_its_source(bench: Bench, variant: str) -> None:
    """Logits of a text that calibration did not see: what layers win is not lost in between."""
    best, plain = (bench.outcome(variant, method=method) for method in ("gptq+awq", "rtn"))
    ids = text_ids(best.source)
    source = best.logits(best.source.read, ids)
    got = divergence(source, best.logits(best.result.checkpoint.read, ids))
    assert got < divergence(source, plain.logits(plain.result.checkpoint.read, ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_move_without_changing_the_model(bench: Bench, variant: str) -> None:
    """The float weights with their factors compute what the source computes."""
    outcome = bench.outcome(variant, method="awq")
    matrices = frozenset(outcome.result.store.packed)
    floats = CalibratedStore(outcome.source, outcome.layers(), "", kept=matrices)
    assert floats.scaled
    assert not floats.packed
    scaled = outcome.source.with_calibration(floats)
    expected = outcome.logits(outcome.source.read, IDS)
    np.testing.assert_allclose(outcome.logits(scaled.read, IDS), expected, atol=2e-3)


def test_rtn_gives_the_integers_of_an_export_without_calibration(bench: Bench) -> None:
    outcome = bench.outcome("llama", method="rtn")
    for name in outcome.result.store.packed:
        plain = quantize_int4(outcome.source.read(name), 32, True)
        got = outcome.result.store.integers(name).block(0, len(plain.codes))()
        np.testing.assert_array_equal(got.codes, plain.codes)
        np.testing.assert_array_equal(got.scales, plain.scales)
    assert not outcome.result.store.scaled


def test_the_same_calibration_twice_gives_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    first, second = (bench.calibrate(tmp_path / n, "tied-mha", method="gptq+awq") for n in "ab")
    for one, other in zip(first.layers(), second.layers(), strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
    assert first.result.record == second.result.record


def test_zero_points(bench: Bench) -> None:
    outcome = bench.outcome("llama", method="gptq", symmetric=False)
    name = next(iter(outcome.result.store.packed))
    matrix = outcome.result.store.integers(name)
    assert not matrix.scheme.symmetric
    assert mean_error(outcome) < mean_error(bench.outcome("llama", method="rtn"))


def test_groups_that_do_not_divide_the_columns_shrink(bench: Bench) -> None:
    outcome = bench.outcome("llama", group_size=64)
    sizes = {
        n.split(".")[-2]: outcome.result.store.integers(n).scheme.group_size
        for n in outcome.result.store.packed
    }
    assert sizes["q_proj"] == 64
    assert sizes["down_proj"] == 32  # 96 columns


def test_experts_that_no_token_reaches_are_rounded_and_named(bench: Bench, tmp_path: Path) -> None:
    inputs = gather._expert_inputs

    def without_the_last(module: Any, rows: Any) -> Any:
        for expert, mine, inner in inputs(module, rows):
            yield (expert, mine[:0], inner[:0]) if expert == 7 else (expert, mine, inner)

    with (
        patch.object(gather, "_expert_inputs", without_the_last),
        pytest.warns(ExportWarning, match="no calibration token reached 6 matrices of experts") as caught,
    ):
        outcome = bench.calibrate(tmp_path / "moe", "moe", method="gptq")
    assert "model.layers.0.mlp.experts.7.w1.weight" in str(caught[0].message)
    name = "model.layers.1.mlp.experts.7.w2.weight"
    assert name in outcome.result.record["unreached"]
    got = outcome.result.store.integers(name).block(0, 64)()
    np.testing.assert_array_equal(got.codes, quantize_int4(outcome.source.read(name), 32, True).codes)


def test_the_most_sensitive_matrices_stay_int8(bench: Bench) -> None:
    outcome = bench.outcome("llama", ratio=0.6)
    rows = outcome.result.sensitivities
    kept, others = ([row for row in rows if row.kept is keep] for keep in (True, False))
    weights = sum(row.weights for row in rows)
    assert 0.25 * weights < sum(row.weights for row in kept) <= 0.4 * weights
    assert rows[0] == max(rows, key=lambda row: row.error)
    assert rows[0].kept
    assert set(outcome.result.store.packed) == {row.name for row in others}
    assert outcome.result.record["int8"] == [row.name for row in kept]


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("llama", {"weight_format": "int8", "group_size": None}, "expected int4 layers, got int8"),
        ("gptq", {"weight_format": "auto", "group_size": None}, "are integers already"),
    ],
)
def test_what_is_not_calibrated(
    bench: Bench, tmp_path: Path, variant: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        bench.calibrate(tmp_path / "work", variant, **changes)
    assert not (tmp_path / "work").exists()


def test_activations_that_are_not_finite(bench: Bench, tmp_path: Path) -> None:
    add = Hessian.add

    def spoiled(moment: Any, inputs: Any) -> None:
        add(moment, inputs * np.float32(np.nan))

    with (
        patch.object(Hessian, "add", spoiled),
        pytest.raises(ExportError, match="activations are not finite"),
    ):
        bench.calibrate(tmp_path / "work", "tied-mha")

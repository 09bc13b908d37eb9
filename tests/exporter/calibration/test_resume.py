"""A calibration that was interrupted goes on, and ends in the same bytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cpm_edge.exporter.calibration.driver import Calibrator
from cpm_edge.exporter.calibration.matrices import LayerResult
from cpm_edge.exporter.errors import ExportWarning
from tests.exporter.calibration.conftest import Bench, Outcome

VARIANT = "llama"  # three layers


class Killed(BaseException):
    """In place of a signal: nothing of the program may handle it."""


def interrupted(bench: Bench, folder: Path, function: str, layer: int) -> None:
    """Calibrate until ``function`` of the driver is called for a layer."""
    original = getattr(Calibrator, function)

    def stop(self: Calibrator, index: int, *rest: Any) -> Any:
        if index == layer:
            raise Killed
        return original(self, index, *rest)

    with patch.object(Calibrator, function, stop), pytest.raises(Killed), quiet():
        bench.calibrate(folder, VARIANT)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_same_bytes(bench: Bench, tmp_path: Path, layer: int) -> None:
    whole = bench.outcome(VARIANT)
    interrupted(bench, tmp_path / "work", "_layer", layer)
    check_resumed(bench, tmp_path / "work", whole, layer)


def test_the_same_bytes_when_only_a_result_is_missing(bench: Bench, tmp_path: Path) -> None:
    """The hidden states behind layer 1 are there, but it is not finished: it is done once more."""
    folder = tmp_path / "work"
    with patch.object(LayerResult, "save", saving_until(1)), pytest.raises(Killed), quiet():
        bench.calibrate(folder, VARIANT)
    assert (folder / "hidden-00002.f32").is_file()
    check_resumed(bench, folder, bench.outcome(VARIANT), 1)


def check_resumed(bench: Bench, folder: Path, whole: Outcome, done: int) -> None:
    with pytest.warns(ExportWarning, match=f"goes on behind layer {done} of 3"):
        resumed = bench.calibrate(folder, VARIANT)
    for one, other in zip(whole.layers(), resumed.layers(), strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
    assert not list(folder.glob("hidden-*"))
    assert resumed.result.record == whole.result.record


def saving_until(layer: int) -> Any:
    """``LayerResult.save`` that is killed at one layer."""
    save = LayerResult.save

    def stop(self: LayerResult, path: Path) -> None:
        if path.stem == f"layer-{layer:05}":
            raise Killed
        save(self, path)

    return stop


def quiet() -> Any:
    return warnings.catch_warnings(action="ignore", category=ExportWarning)


@pytest.mark.parametrize("changes", [{"method": "awq"}, {"group_size": 64}, {"calibration_tokens": 256}])
def test_other_options_begin_anew(bench: Bench, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "work"
    interrupted(bench, folder, "_layer", 1)
    with pytest.warns(ExportWarning, match="the 1 layers in .* are of other options; all are done again"):
        outcome = bench.calibrate(folder, VARIANT, **changes)
    expected = bench.outcome(VARIANT, **changes)
    assert outcome.layers()[2].path.read_bytes() == expected.layers()[2].path.read_bytes()


@pytest.mark.parametrize("state", ['{"version": 2}', '{"job": ', "[]"])
def test_a_state_that_cannot_be_read_begins_anew(bench: Bench, tmp_path: Path, state: str) -> None:
    """Of an older version, or damaged."""
    folder = tmp_path / "work"
    interrupted(bench, folder, "_layer", 1)
    (folder / "calibration.json").write_text(state)
    with pytest.warns(ExportWarning, match="all are done again"):
        outcome = bench.calibrate(folder, VARIANT)
    whole = bench.outcome(VARIANT)
    assert outcome.layers()[0].path.read_bytes() == whole.layers()[0].path.read_bytes()


def test_other_threads_are_said_to_turn_codes(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    interrupted(bench, folder, "_layer", 1)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "17")
    with pytest.warns(ExportWarning) as notes:
        bench.calibrate(folder, VARIANT)
    assert any("OPENBLAS_NUM_THREADS=17: the bytes may differ" in str(note.message) for note in notes)


def test_an_interruption_says_what_is_kept(bench: Bench, tmp_path: Path) -> None:
    with (
        patch.object(LayerResult, "save", saving_until(1)),
        pytest.raises(Killed),
        pytest.warns(ExportWarning, match="1 of 3 layers are calibrated; the same command goes on from"),
    ):
        bench.calibrate(tmp_path / "work", VARIANT)

from __future__ import annotations

from pathlib import Path

import pytest

from cpm_edge.benchmarks import artifacts
from cpm_edge.benchmarks.artifacts import Artifacts, Build, code_digest
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.shape import Shape
from tests.benchmarks.shapes import TINY, in_this_process

SHAPE = Shape("tiny", TINY)


@pytest.fixture(autouse=True)
def fake_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files instead of models."""
    monkeypatch.setattr(Artifacts, "run", in_this_process)
    monkeypatch.setattr(artifacts, "_write_checkpoint", lambda shape, path, ternary: path.mkdir())
    monkeypatch.setattr(artifacts, "_export", lambda source, path, build: path.mkdir())
    monkeypatch.setattr(artifacts, "_write_gguf", lambda source, path, format_: path.write_text("gguf"))


def test_files_are_kept_in_a_cache_and_found_again(tmp_path: Path) -> None:
    with Artifacts(SHAPE, tmp_path) as made:
        bundle, gguf = made.bundle(Build()), made.gguf("Q4_0")
        assert bundle != made.bundle(Build(attention="dense"))
    gguf.write_text("kept")
    with Artifacts(SHAPE, tmp_path) as again:
        assert again.bundle(Build()) == bundle and again.gguf("Q4_0").read_text() == "kept"
    assert made.folder != Artifacts(SHAPE.changed(layers=1), tmp_path).folder
    assert made.folder != Artifacts(SHAPE, tmp_path, ternary=True).folder


def test_without_a_cache_nothing_stays_and_the_checkpoint_goes_first() -> None:
    with Artifacts(SHAPE, None) as made:
        bundle = made.bundle(Build())
        checkpoint = made.checkpoint()
        assert checkpoint.exists()
        made.finish()
        assert bundle.exists() and not checkpoint.exists()
        assert made.bundle(Build()) == bundle
    assert not made.folder.exists()


def test_a_cached_bundle_needs_no_checkpoint(tmp_path: Path) -> None:
    with Artifacts(SHAPE, tmp_path) as made:
        made.bundle(Build())
        made.checkpoint().rmdir()
    with Artifacts(SHAPE, tmp_path) as again:
        again.bundle(Build())
        assert not [path for path in again.folder.iterdir() if path.name.startswith("checkpoint")]


def test_what_was_interrupted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(source: Path, path: Path, build: Build) -> None:
        path.mkdir()
        raise BenchError("interrupted")

    with Artifacts(SHAPE, tmp_path) as made, monkeypatch.context() as patch:
        patch.setattr(artifacts, "_export", half)
        with pytest.raises(BenchError):
            made.bundle(Build())
    with Artifacts(SHAPE, tmp_path) as again:
        assert again.bundle(Build()).exists()
        assert not list(again.folder.glob(".partial-*"))


def test_names_follow_the_code() -> None:
    assert code_digest("quant") == code_digest("quant")
    assert len({code_digest("quant"), code_digest("plugins"), code_digest("quant", "plugins")}) == 3


def test_the_child_process_runs_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with Artifacts(SHAPE, tmp_path) as made:
        made.run(Path.touch, tmp_path / "from-the-child")
        with pytest.raises(FileNotFoundError):
            made.run(Path.touch, tmp_path / "missing" / "file")
    assert (tmp_path / "from-the-child").exists()

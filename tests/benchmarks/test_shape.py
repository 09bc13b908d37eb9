from __future__ import annotations

from pathlib import Path

import pytest

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.shape import Shape, shape_names
from tests.benchmarks.shapes import write_shape
from tests.source_tree import ROOT


def test_the_shapes_that_come_along_are_published_ones() -> None:
    assert shape_names() == ["minicpm-sala", "minicpm4-0.5b", "minicpm4-8b"]
    for name in shape_names():
        published = Shape.open(str(ROOT / f"tests/data/configs/{name}.json"))
        assert Shape.open(name).parsed() == published.parsed()


def test_layers_and_context_can_be_changed(tmp_path: Path) -> None:
    shape = Shape.open(str(write_shape(tmp_path)))
    assert shape.name == "tiny"
    changed = shape.changed(layers=1, context=4096)
    assert (changed.config["num_hidden_layers"], changed.config["max_position_embeddings"]) == (1, 4096)
    assert changed.changed(context=100).config["max_position_embeddings"] == 4096
    assert shape.config["num_hidden_layers"] == 2, "the original stays"
    sala = Shape.open("minicpm-sala").changed(layers=10)
    assert sala.parsed().mixer_types == ("minicpm4", *["lightning-attn"] * 8, "minicpm4")


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}'])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="shape: expected"):
        Shape.open(str(path))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nosuch", "the path of a checkpoint's config.json"),
        ("minicpm4-05b", "did you mean minicpm4-0.5b?"),
        (".", "give the file in it: config.json"),
    ],
)
def test_a_name_that_is_no_shape_is_refused(name: str, hint: str) -> None:
    with pytest.raises(
        BenchError, match=rf"minicpm4-0\.5b.* or the path of a config.json, got {name},"
    ) as error:
        Shape.open(name)
    assert "Errno" not in str(error.value) and error.value.hint is not None and hint in error.value.hint

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter.checkpoint import Checkpoint, open_checkpoint
from cpm_edge.exporter.errors import ExportWarning
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.taken import GridIntegers, StoredIntegers
from cpm_edge.exporter.weight_format import (
    Choice,
    choose_format,
    grid_format,
    looks_ternary,
    note_rounded,
)
from cpm_edge.quant import WeightFormat
from tests.support.bundles import Bundles
from tests.support.checkpoints import Tensors, config_of, linear_names, tensors_of, write_checkpoint


def choose(asked: str, checkpoint: Checkpoint, **options: Any) -> Choice:
    return choose_format(
        ExportOptions("model", "ort", Path("out"), weight_format=asked, **options), checkpoint
    )


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[type]:
    """A function that opens a checkpoint of these tensors."""
    made: list[Checkpoint] = []

    def open_(tensors: Tensors, variant: str = "ternary") -> Checkpoint:
        folder = write_checkpoint(tmp_path / str(len(made)), config_of(variant), tensors)
        made.append(open_checkpoint(str(folder)))
        return made[-1]

    yield open_  # type: ignore[misc]
    for checkpoint in made:
        checkpoint.close()


def test_auto_follows_the_checkpoint(bundles: Bundles) -> None:
    for variant, expected in (("ternary", "ternary"), ("ternary-row", "ternary"), ("llama", "int4")):
        with open_checkpoint(str(bundles.checkpoint(variant))) as checkpoint:
            assert choose("auto", checkpoint) == Choice(WeightFormat(expected))


def test_only_the_linear_layers_count(opened: type) -> None:
    tensors = tensors_of("llama")
    tensors["model.embed_tokens.weight"] = np.sign(tensors["model.embed_tokens.weight"])
    assert not looks_ternary(opened(tensors, "llama"))


def test_zeros_say_nothing(opened: type) -> None:
    tensors = tensors_of("ternary")
    for name in linear_names(tensors):
        tensors[name][:] = 0
    assert not looks_ternary(opened(tensors))


@pytest.mark.parametrize(("good", "expected"), [(3, True), (1, False)])
def test_half_of_the_sampled_rows_decide(opened: type, good: int, expected: bool) -> None:
    tensors = tensors_of("ternary")
    for number, name in enumerate(linear_names(tensors)):
        if number % 4 >= good:
            tensors[name] += np.random.default_rng(number).standard_normal(tensors[name].shape).astype("f4")
    assert looks_ternary(opened(tensors)) is expected


@pytest.mark.parametrize("asked", ["int4", "int8"])
def test_quantizing_ternary_weights_again_is_noted(bundles: Bundles, asked: str) -> None:
    with (
        open_checkpoint(str(bundles.checkpoint("ternary"))) as checkpoint,
        pytest.warns(ExportWarning, match=f"ternary are ternary and {asked} quantizes them again"),
    ):
        assert choose(asked, checkpoint) == Choice(WeightFormat(asked))


@pytest.mark.parametrize("asked", ["ternary", "bf16", "fp32"])
def test_formats_that_lose_nothing_are_taken_as_asked(bundles: Bundles, asked: str) -> None:
    with open_checkpoint(str(bundles.checkpoint("ternary"))) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(asked, checkpoint) == Choice(WeightFormat(asked))


@pytest.mark.parametrize("options", [{}, {"group_size": 128}])
@pytest.mark.parametrize("asked", ["auto", "int4"])
def test_integers_of_the_checkpoint_are_kept(bundles: Bundles, asked: str, options: dict[str, Any]) -> None:
    with open_checkpoint(str(bundles.checkpoint("gptq"))) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose(asked, checkpoint, **options)
        assert choice.format is WeightFormat.INT4 and isinstance(choice.taken, StoredIntegers)


@pytest.mark.parametrize(
    ("asked", "options"),
    [("int8", {}), ("bf16", {}), ("int4", {"group_size": 64}), ("int4", {"symmetric": False})],
)
def test_rounding_integers_of_the_checkpoint_is_noted(
    bundles: Bundles, asked: str, options: dict[str, Any]
) -> None:
    with (
        open_checkpoint(str(bundles.checkpoint("gptq"))) as checkpoint,
        pytest.warns(ExportWarning, match=f"gptq are int4 g128 sym and {asked} quantizes them again"),
    ):
        assert choose(asked, checkpoint, **options) == Choice(WeightFormat(asked))


def test_a_head_format_holds_for_a_quantized_head(bundles: Bundles) -> None:
    with open_checkpoint(str(bundles.checkpoint("gptq"))) as checkpoint:
        taken = choose("auto", checkpoint, head_format="int8").taken
        assert isinstance(taken, StoredIntegers) and taken.leave == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("variant", "format_", "kept"),
    [
        ("gguf-q4_0", "int4", True),
        ("gguf-q8_0", "int8", True),
        ("gguf-mixed", "int4", True),
        ("gguf-q4_1-zeros", "int4", True),
        ("gguf-q4_1", "int4", False),
        ("gguf-q4_k", "int4", False),
        ("gguf-bf16", "int4", False),
        ("gguf-tq2_0", "ternary", False),
    ],
)
def test_gguf_types(bundles: Bundles, variant: str, format_: str, kept: bool) -> None:
    with open_checkpoint(str(bundles.checkpoint(variant))) as checkpoint:
        choice = choose("auto", checkpoint)
        assert choice.format is WeightFormat(format_) and (choice.taken is not None) is kept


@pytest.mark.parametrize(
    ("variant", "options", "noted"),
    [
        ("gguf-q4_k", {}, {"12 linear layers are stored as Q4_K", "2 linear layers are stored as Q6_K"}),
        ("gguf-mixed", {}, {"2 linear layers are stored as Q6_K"}),
        (
            "minicpm3-gguf-q4_1",
            {},
            {"14 linear layers are stored as Q4_1", "2 linear layers are stored as Q4_1"},
        ),
        ("gguf-q4_0", {}, set()),
        ("gguf-f16", {}, set()),
        ("gguf-tq2_0", {}, set()),
        ("gguf-q4_k", {"weight_format": "bf16"}, set()),
        ("gguf-q4_0", {"weight_format": "int8"}, set()),  # choose_format has said it
    ],
)
def test_blocks_that_are_rounded_are_noted(
    bundles: Bundles, variant: str, options: dict[str, Any], noted: set[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        with bundles.plan(variant, "ort", **({"weight_format": "auto"} | options)) as (_, weights):
            weights.find_schemes()
            note_rounded(weights)
    told = {str(warning.message) for warning in caught}
    assert {text.split(" and are")[0] for text in told if "stored as" in text} == noted


@pytest.mark.parametrize(("variant", "group"), [("qat", 128), ("qat-32", 32), ("qat-floats", 64)])
def test_weights_on_a_grid_are_taken_from_it(bundles: Bundles, variant: str, group: int) -> None:
    with open_checkpoint(str(bundles.checkpoint(variant))) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked, size in (("auto", None), ("int4", None), ("int4", group)):
            choice = choose(asked, checkpoint, group_size=size)
            assert choice.format is WeightFormat.INT4 and isinstance(choice.taken, GridIntegers)
        assert choose("bf16", checkpoint) == Choice(WeightFormat.BF16)


def test_ordinary_and_empty_weights_lie_on_no_grid(opened: type, bundles: Bundles) -> None:
    with open_checkpoint(str(bundles.checkpoint("llama"))) as checkpoint:
        assert grid_format(checkpoint) is None
    tensors = tensors_of("llama")
    for name in linear_names(tensors):
        tensors[name][:] = 0
    assert grid_format(opened(tensors, "llama")) is None

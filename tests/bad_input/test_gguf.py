"""Damaged GGUF files: refused by the name of the tensor, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.bad_input.bench import Bench, Refusal
from tests.support import gguf_file
from tests.support.checkpoints import config_of, gguf_of, gguf_sources
from tests.support.gguf_file import Blocks

UP = "model.layers.1.mlp.up_proj.weight"
ROW = 77
TARGETS = {"ort": ("ort", ()), "stock": ("aipc", ()), "native": ("aipc", ("--flavour", "native"))}
for_targets = pytest.mark.parametrize(("target", "flavour"), TARGETS.values(), ids=TARGETS)

Bytes = npt.NDArray[np.uint8]
NO_NUMBER = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
NON_FINITE = f"tensor {UP}: row {ROW} holds NaN or infinity"


def not_a_number(place: int) -> Callable[[Bytes], None]:
    """NaN in place of the float16 at an offset of a row's bytes."""

    def damage(rows: Bytes) -> None:
        rows[ROW, place : place + 2] = NO_NUMBER

    return damage


def fourth_code(rows: Bytes) -> None:
    """TQ2_0 has codes 0, 1 and 2 for -d, 0 and d; code 3 would be 2 d."""
    rows[ROW, 5] |= np.uint8(3)


# Variant, damage of the rows of UP, error.
DAMAGES: dict[str, tuple[str, Callable[[Bytes], None], str]] = {
    "Q4_0": ("gguf-q4_0", not_a_number(18), NON_FINITE),
    "Q8_0": ("gguf-q8_0", not_a_number(0), NON_FINITE),
    "a scale of Q4_1": ("gguf-q4_1-zeros", not_a_number(0), NON_FINITE),
    "a minimum of Q4_1": ("gguf-q4_1-zeros", not_a_number(22), NON_FINITE),
    "Q4_1 that is rounded": ("gguf-q4_1", not_a_number(2), NON_FINITE),
    "Q4_K": ("gguf-q4_k", not_a_number(0), NON_FINITE),
    "F16": ("gguf-f16", not_a_number(100), NON_FINITE),
    "TQ1_0": ("gguf-tq1_0", not_a_number(52), NON_FINITE),
    "TQ2_0": ("gguf-tq2_0", not_a_number(64), NON_FINITE),
    "a fourth code of TQ2_0": ("gguf-tq2_0", fourth_code, f"tensor {UP}: row {ROW} is not ternary"),
}


def write(bench: Bench, variant: str, blocks: dict[str, Blocks]) -> Path:
    path = bench.checkpoint / "tiny.gguf"
    return gguf_file.write(path, config_of(variant), gguf_sources(variant), blocks)


def refusal_of(bench: Bench, name: str, target: str = "ort", flavour: tuple[str, ...] = ()) -> Refusal:
    """What an export says to a file of which one tensor is damaged."""
    variant, damage, _ = DAMAGES[name]
    blocks = gguf_of(variant)
    rows = blocks[UP].rows.view(np.uint8).copy()
    damage(rows)
    blocks[UP] = replace(blocks[UP], rows=rows.view(blocks[UP].rows.dtype))
    return bench.export_fails(*flavour, target=target, model=write(bench, variant, blocks))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_block_is_named(bench: Bench, name: str) -> None:
    refusal = refusal_of(bench, name)
    refusal.says(DAMAGES[name][2], hint="--weight-format int4" if "fourth" in name else "damaged")


@for_targets
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "a scale of Q4_1", "TQ1_0", "a fourth code of TQ2_0"])
def test_a_damaged_block_is_named_for_every_target(
    bench: Bench, name: str, target: str, flavour: tuple[str, ...]
) -> None:
    refusal_of(bench, name, target, flavour).says(DAMAGES[name][2], hint="")


def test_a_truncated_file(bench: Bench) -> None:
    path = write(bench, "gguf-q4_0", gguf_of("gguf-q4_0"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    refusal = bench.export_fails(model=path)
    refusal.says("tiny.gguf", "expected", f"got {len(whole) - 1000}", hint="truncated or damaged")


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (480, None, ["expected shape [512, 256]", "got [480, 256]"]),
        (None, 4 * 18, ["expected shape [512, 256]", "got [512, 128]"]),
    ],
    ids=["rows", "groups"],
)
def test_a_matrix_of_another_model(
    bench: Bench, rows: int | None, columns: int | None, words: list[str]
) -> None:
    blocks = gguf_of("gguf-q4_0")
    kept = np.ascontiguousarray(blocks[UP].rows[:rows, :columns])
    blocks[UP] = replace(blocks[UP], rows=kept)
    refusal = bench.export_fails(model=write(bench, "gguf-q4_0", blocks))
    refusal.says(f"tensor {UP}", *words, hint="different models")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_blocks_that_are_rounded_are_told(bench: Bench, method: str) -> None:
    blocks = gguf_of("gguf-q4_k")
    result = bench.export("--method", method, model=write(bench, "gguf-q4_k", blocks))
    assert result.exit_code == 0
    for count, kind in ((12, "Q4_K"), (2, "Q6_K")):
        told = f"warning: {count} linear layers are stored as {kind} and are quantized again, to int4 g32 sym"
        assert told in result.stderr


def test_blocks_of_zeros_are_weights(bench: Bench) -> None:
    """A scale of 0 is how Q4_0 says that a block is zeros."""
    blocks = gguf_of("gguf-q4_0")
    rows = blocks[UP].rows.copy()
    rows[ROW, :18] = 0
    blocks[UP] = replace(blocks[UP], rows=rows)
    result = bench.export(model=write(bench, "gguf-q4_0", blocks))
    assert result.exit_code == 0, result.stderr

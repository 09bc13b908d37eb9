"""What ``cpm-export`` tells on the command line when it is done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cpm_edge.exporter.cli import main
from tests.support.checkpoints import VARIANTS, make_tensors, write_checkpoint


def summary(variant: str, folder: Path, *options: str) -> dict[str, str]:
    """The lines of the table by their names."""
    config = VARIANTS[variant]
    checkpoint = write_checkpoint(folder / variant, config, make_tensors(config))
    arguments = ["-m", str(checkpoint), "-o", str(folder / "bundle"), "--no-verify", *options]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.stderr
    lines = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in result.stderr.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        (("-t", "ort"), "0.4 kB a token (float32); keys and values of every head would take 1.6 kB"),
        (
            ("-t", "aipc", "--flavour", "native"),
            "0.2 kB a token (float16); keys and values of every head would take 0.8 kB",
        ),
    ],
    ids=["ort", "native"],
)
def test_the_cache_of_latents_beside_the_expanded_form(
    tmp_path: Path, options: tuple[str, ...], cost: str
) -> None:
    table = summary("minicpm3", tmp_path, *options)
    assert table["cache"] == cost
    assert table["kv_b_proj"] == "int8 row sym"


def test_a_cache_of_keys_and_values(tmp_path: Path) -> None:
    table = summary("llama", tmp_path, "-t", "ort", "--weight-format", "int8")
    assert re.fullmatch(r"\d\.\d kB a token \(float32\)", table["cache"])
    assert "kv_b_proj" not in table

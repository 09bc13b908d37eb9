from __future__ import annotations

from pathlib import Path

import pytest

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.programs import check_program
from tests.bad_input.bench import refused
from tests.benchmarks.peers.test_llama_cpp import program
from tests.benchmarks.shapes import bench


def test_a_program_that_can_be_started_and_none_at_all_are_fine(tmp_path: Path) -> None:
    check_program("--llama-bench", program(tmp_path, ""))
    check_program("--llama-bench", None)


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    file = program(tmp_path, "")
    file.chmod(0o644)
    with pytest.raises(BenchError, match=f"expected a program, got {file}, which is not executable") as error:
        check_program("--llama-bench", file)
    assert error.value.hint is not None and "chmod +x" in error.value.hint
    with pytest.raises(BenchError, match="which is a folder"):
        check_program("--llama-bench", tmp_path)


def test_a_program_of_that_name_elsewhere_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = program(tmp_path, "")
    with pytest.raises(BenchError) as error:
        check_program("--llama-bench", Path("wrong/llama-bench"))
    assert error.value.hint == f"did you mean {found}?"


@pytest.mark.parametrize(
    ("command", "option"),
    [("context", "--llama-bench"), ("export", "--optimum-cli"), ("export", "--genai-python")],
)
def test_every_subcommand_refuses_at_once(tmp_path: Path, command: str, option: str) -> None:
    refused(bench(command, option, tmp_path / "gone")).says(
        f"{option}: expected a program, got {tmp_path / 'gone'}, which does not exist", hint="check the path"
    )

from __future__ import annotations

import warnings

import pytest

from cpm_edge.exporter.console import warnings_printed
from cpm_edge.exporter.errors import ExportWarning


def test_each_text_is_one_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_printed() as messages:
        for text in ("a", "b", "a"):
            warnings.warn(text, ExportWarning, stacklevel=1)
        assert capsys.readouterr().err == "", "not into the progress of an export"
    assert capsys.readouterr().err == "warning: a\nwarning: b\n"
    assert messages == ["a", "b"]


def test_a_failed_export_tells_its_warnings_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="failed"), warnings_printed():
        warnings.warn("a", ExportWarning, stacklevel=1)
        raise ValueError("failed")
    assert capsys.readouterr().err == "warning: a\n"

"""Perplexity of one checkpoint in every weight format, from real bundles on both engines.

The text's characters 20,000 to 60,000 are cut into four windows of 512 tokens, each scored from an empty
context; the first token of a window is not predicted.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.report import Report
from cpm_edge.exporter.export import export
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes import load
from cpm_edge.runtimes.model import Model
from cpm_edge.runtimes.session import Session

CHARACTERS = slice(20_000, 60_000)
WINDOW = 512
WINDOWS = 4

# Layer linears rounded to nearest in torch, embedding and head in fp32: what a bundle must reach within 1 %.
MEASURED = {"fp": 10.43, "g32 sym": 11.53, "g32 asym": 11.80, "g64 sym": 12.26, "g64 asym": 12.37}
# Name, options, key in MEASURED.
ROWS: list[tuple[str, dict[str, object], str | None]] = [
    ("bf16", {"weight_format": "bf16"}, "fp"),
    ("int8", {"weight_format": "int8"}, None),
    ("int4 g32 sym", {"weight_format": "int4", "group_size": 32}, "g32 sym"),
    ("int4 g32 asym", {"weight_format": "int4", "group_size": 32, "symmetric": False}, "g32 asym"),
    ("int4 g64 sym", {"weight_format": "int4", "group_size": 64}, "g64 sym"),
    ("int4 g64 asym", {"weight_format": "int4", "group_size": 64, "symmetric": False}, "g64 asym"),
]


def negative_log_likelihood(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> float:
    """Summed over rows: logits (T, vocab), the token that followed each row (T,)."""
    rows = logits.astype(np.float64)
    top = rows.max(1)
    total = np.log(np.exp(rows - top[:, None]).sum(1)) + top
    return float((total - rows[np.arange(len(targets)), targets]).sum())


def perplexity(session: Session, tokens: npt.NDArray[np.int64], window: int = WINDOW) -> float:
    """exp of the mean negative log likelihood over windows that start from an empty context."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - window + 1, window):
        part = tokens[start : start + window]
        session.reset()
        total += negative_log_likelihood(session.forward(part, logits="all")[:-1], part[1:])
        count += window - 1
    return float(np.exp(total / count))


def read_text(path: Path) -> str:
    """A text file, gzipped or not.

    Raises:
        BenchError: it is not UTF-8 text.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise BenchError(f"{path}: expected UTF-8 text, plain or .gz: {error}") from error


def cut_windows(
    model: Model, text: Path, characters: tuple[int, int], window: int, windows: int
) -> npt.NDArray[np.int64]:
    """Tokens of a part of a text file, int64 (at most ``windows``, ``window``).

    Raises:
        BenchError: the part has fewer tokens than one window.
    """
    content = read_text(text)[slice(*characters)]
    tokens = np.array(model.encode(content)[: window * windows], np.int64)
    if len(tokens) < window:
        raise BenchError(
            f"--text: expected {window} tokens or more in characters {characters[0]} to {characters[1]}, "
            f"got {len(tokens)}",
            hint="a longer text, or smaller --characters and --window",
        )
    return tokens[: len(tokens) // window * window].reshape(-1, window)


def measure(options: ExportOptions, text: str) -> float:
    """Export and score one bundle."""
    export(options, Progress())
    model = load(options.output)
    tokens = np.array(model.encode(text)[: WINDOW * WINDOWS])
    with model.session() as session:
        result = perplexity(session, tokens)
    model.close()
    return result


def _variants(model: str, target: str, folder: Path) -> Iterator[tuple[str, str, ExportOptions, str | None]]:
    for name, changes, key in ROWS:
        for outer in ("bf16" if name == "bf16" else "fp32", "int8"):
            options = ExportOptions(
                model=model,
                target=target,
                output=folder / f"{target}-{name}-{outer}".replace(" ", "-"),
                embedding_format=outer,
                head_format=outer,
                activations="fp32",
                verify=False,
                **changes,  # type: ignore[arg-type]
            )
            yield name, outer, options, key


def run(model: str, text: Path, targets: tuple[str, ...]) -> Report:
    """Export and score every format of ROWS on every target."""
    content = read_text(text)[CHARACTERS]
    columns = [f"{target}, {outer} embedding and head" for target in targets for outer in ("fp", "int8")]
    table = Table("linear layers", "measured in torch, fp outer", *columns)
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            for name, _, options, _ in _variants(model, target, Path(folder)):
                results.setdefault(name, []).append(measure(options, content))
    for name, _, key in ROWS:
        measured = MEASURED.get(key) if key else None
        cells = [_cell(value, measured) for value in results[name]]
        table.add_row(name, f"{measured:.2f}" if measured else "", *cells)
    settings = {"model": model, "text": str(text), "targets": list(targets)}
    rows = {name: dict(zip(columns, values, strict=True)) for name, values in results.items()}
    return Report("perplexity", settings, results={"perplexity": rows}, tables=[table])


def _cell(value: float, measured: float | None) -> str:
    return f"{value:.3f}" if measured is None else f"{value:.3f} ({value / measured - 1:+.1%})"

"""``cpm-bench calibration``: methods and group sizes, and their peers, scored on one text in one run.

Everything but the linear layers is float32, and activations too, so that a row differs from the next in the
integers alone. Windows are scored from an empty context against our modules on the checkpoint's own weights.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from cpm_edge.benchmarks.bundle.accuracy import reference_of
from cpm_edge.benchmarks.calibration.nncf_peer import NncfPeer
from cpm_edge.benchmarks.perplexity import cut_windows, negative_log_likelihood
from cpm_edge.benchmarks.report import Report
from cpm_edge.exporter.calibration.dataset import read_sequences
from cpm_edge.exporter.calibration.settings import Settings
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.export import export
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from cpm_edge.exporter.verify import compare
from cpm_edge.runtimes import load
from cpm_edge.runtimes.manifest import Manifest

FloatArray = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        model: the checkpoint.
        text: scored in ``windows`` of ``window`` tokens from its ``characters``.
        dataset: calibration text; None is the exporter's own.
        nncf_python: of a venv with nncf; None leaves it out.
        others: checkpoints of the same model in other formats (GGUF), scored with their own weights.
    """

    model: str
    text: Path
    dataset: Path | None
    tokens: int
    methods: tuple[str, ...]
    groups: tuple[int, ...]
    characters: tuple[int, int]
    window: int
    windows: int
    nncf_python: Path | None = None
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Score:
    """What a row's weights do to the text.

    Attributes:
        bits: of a weight in the linear layers, scales included; None for other checkpoints.
        kl: divergence from the checkpoint, nats a token.
        top1: share of the tokens whose best successor is the checkpoint's.
    """

    bits: float | None
    perplexity: float
    kl: float
    top1: float


class Scorer:
    """Compares logits with those of the checkpoint.

    Args:
        windows: int64 (windows, T).
        expected: of each window, float32 (T, vocab).
    """

    def __init__(self, windows: Tokens, expected: Iterable[FloatArray]) -> None:
        self._windows = windows
        self._expected = list(expected)
        self.perplexity = self.score(None, self._expected).perplexity

    def score(self, bits: float | None, logits: Iterable[FloatArray]) -> Score:
        """The score of the logits of all windows."""
        loss = kl = top1 = 0.0
        for window, expected, got in zip(self._windows, self._expected, logits, strict=True):
            loss += negative_log_likelihood(got[:-1], window[1:])
            found = compare(expected, got)
            kl, top1 = kl + found["kl"], top1 + found["top1"]
        count = len(self._windows)
        predicted = count * (self._windows.shape[1] - 1)
        return Score(bits, float(np.exp(loss / predicted)), kl / count, top1 / count)


def run(request: Request) -> Report:
    """Export, compress and score every row.

    Raises:
        BenchError: the text is too short, or a peer failed.
        ExportError: what ``cpm-export`` would refuse.
    """
    report = Report("calibration", {name: str(value) for name, value in vars(request).items()})
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="cpm-bench-") as name:
        comparison = Comparison(request, Path(name))
        rows = {}
        for label, score in comparison.rows():
            rows[label] = score
            console.print(f"{label}: perplexity {score.perplexity:.3f}, KL divergence {score.kl:.3f}")
    reference = comparison.scorer.perplexity
    report.results = {
        "reference_perplexity": reference,
        "rows": {label: asdict(score) for label, score in rows.items()},
    }
    report.versions |= comparison.versions
    report.tables.append(_table(rows, reference, f"{comparison.windows.size} tokens of {request.text.name}"))
    return report


class Comparison:
    """The rows of one request.

    Args:
        request: what is compared.
        folder: for bundles and other intermediate files.

    Attributes:
        windows: int64 (windows, T), what is scored.
        scorer: knows the checkpoint's logits.
        versions: of peers that ran.
    """

    def __init__(self, request: Request, folder: Path) -> None:
        self._request = request
        self._folder = folder
        self._plain = folder / "plain"
        self._manifest = self._export(self._plain, target="aipc", weight_format="fp32")
        self.windows = self._cut()
        with Progress().stage("Scoring the checkpoint"):
            self.scorer = Scorer(self.windows, self._logits_of(request.model))
        self.versions: dict[str, str] = {}

    def rows(self) -> Iterator[tuple[str, Score]]:
        """A label and its score, one after the other."""
        for group in self._request.groups:
            for method in self._request.methods:
                yield self._ours(method, group)
            if self._request.nncf_python is not None:
                yield self._nncf(self._request.nncf_python, group, calibrated=False)
                yield self._nncf(self._request.nncf_python, group, calibrated=True)
        for other in self._request.others:
            with Progress().stage(f"Scoring {other.name}"):
                yield other.name, self.scorer.score(None, self._logits_of(str(other)))

    def _ours(self, method: str, group: int) -> tuple[str, Score]:
        asked = {} if method == "rtn" else self._calibration()
        output = self._folder / f"{method}-{group}"
        manifest = self._export(
            output, target="ort", weight_format="int4", group_size=group, method=method, **asked
        )
        with load(output) as model, model.session() as session:

            def logits() -> Iterator[FloatArray]:
                for window in self.windows:
                    session.reset()
                    yield session.forward(window, logits="all")

            score = self.scorer.score(_bits(group), logits())
        shutil.rmtree(output)
        return f"{method}, {manifest.weights['linear']}", score

    def _nncf(self, python: Path, group: int, *, calibrated: bool) -> tuple[str, Score]:
        sequences = self._sequences() if calibrated else None
        how = "awq + scale_estimation + gptq" if calibrated else "no data"
        peer = NncfPeer(python, self._plain, self.windows, self._folder / "nncf")
        with Progress().stage(f"NNCF, groups of {group}, {how}"):
            self.versions["nncf"], logits = peer.logits(group, sequences)
            return f"NNCF, int4 g{group} sym, {how}", self.scorer.score(_bits(group), logits)

    def _calibration(self) -> dict[str, object]:
        return {"dataset": self._request.dataset, "calibration_tokens": self._request.tokens}

    def _sequences(self) -> Tokens:
        """What our own calibration reads."""
        with open_checkpoint(self._request.model) as checkpoint:
            settings = Settings("gptq", self._request.tokens)
            sizes = self._manifest.vocab_size, self._manifest.context.max_context
            return read_sequences(self._request.dataset, checkpoint, settings, *sizes).ids

    def _logits_of(self, checkpoint: str) -> Iterator[FloatArray]:
        return reference_of(self._manifest, checkpoint)([window.tolist() for window in self.windows])

    def _export(self, output: Path, **changes: object) -> Manifest:
        options = ExportOptions(
            model=self._request.model,
            output=output,
            embedding_format="fp32",
            head_format="fp32",
            activations="fp32",
            verify=False,
            **changes,  # type: ignore[arg-type]
        )
        return export(options, Progress()).manifest

    def _cut(self) -> Tokens:
        request = self._request
        with load(self._plain) as model:
            return cut_windows(model, request.text, request.characters, request.window, request.windows)


def _bits(group: int) -> float:
    """Of a weight in symmetric int4, with its share of a float16 scale."""
    return 4 + 16 / group


def _table(rows: dict[str, Score], reference: float, title: str) -> Table:
    table = Table(
        "", "bits a weight", "perplexity", "of the checkpoint", "KL", "same best token", title=title
    )
    table.add_row("checkpoint", "", f"{reference:.3f}")
    for label, score in rows.items():
        table.add_row(
            label,
            f"{score.bits:.2f}" if score.bits else "",
            f"{score.perplexity:.3f}",
            f"{score.perplexity / reference - 1:+.1%}",
            f"{score.kl:.3f}",
            f"{score.top1:.1%}",
        )
    return table

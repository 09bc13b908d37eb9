"""Which rows a comparison has: ours, and each peer that can be measured here."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from cpm_edge.benchmarks.artifacts import Artifacts, Build
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.peers.llama_cpp import LlamaCppPeer
from cpm_edge.benchmarks.peers.openvino_ir import MODEL, OpenVinoIrPeer
from cpm_edge.benchmarks.peers.ours import OurPeer
from cpm_edge.benchmarks.peers.peer import Peer
from cpm_edge.benchmarks.programs import check_model_folder, check_program
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.bundle import Bundle, open_bundle

TERNARY = Build(weight_format="ternary", group_size=None)
INT4 = Build()
# Sparse layers would run through a portable body that computes every score: dense is what OpenVINO does best.
STOCK = Build(flavour="stock", group_size=128, attention="dense")


@dataclass(frozen=True)
class Wanted:
    """The peers that were asked for.

    Attributes:
        weights: "int4" or "ternary".
        attention: of our native rows, as in ``cpm-export``.
        stock: also our stock flavour.
        openvino_ir: a folder; made by ``optimum_cli`` first where it does not exist.
    """

    weights: str
    attention: str
    threads: int
    stock: bool = True
    llama_bench: Path | None = None
    openvino_ir: Path | None = None
    openvino_python: Path | None = None
    optimum_cli: Path | None = None

    def check_paths(self) -> None:
        """Refuse what was given and is not there; what was not given is skipped later, with a note.

        Raises:
            BenchError: a program or the folder of ``openvino_ir`` cannot be used.
        """
        check_program("--llama-bench", self.llama_bench)
        check_program("--openvino-python", self.openvino_python)
        check_program("--optimum-cli", self.optimum_cli)
        if self.optimum_cli is None or (self.openvino_ir is not None and self.openvino_ir.exists()):
            check_model_folder("--openvino-ir", self.openvino_ir, MODEL)


@dataclass
class Lineup:
    """The rows, in order.

    Attributes:
        bundles: of our native rows, by label.
        notes: which peers are missing, and why.
    """

    peers: list[Peer] = field(default_factory=list)
    bundles: dict[str, Bundle] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.peers.clear()

    def versions(self) -> dict[str, str | None]:
        """Of the peers that tell."""
        found: dict[str, str | None] = {}
        for peer in self.peers:
            if isinstance(peer, LlamaCppPeer):
                found["llama.cpp"] = peer.build
            elif isinstance(peer, OpenVinoIrPeer):
                found["openvino (IR)"] = peer.version
        return found


def gather(wanted: Wanted, artifacts: Artifacts) -> Lineup:
    """Make every file first, then open every engine, ours first.

    Raises:
        ExportError, BenchError: one of our own rows cannot be made, or a peer that is there cannot be opened.
    """
    lineup = Lineup()
    builds = native_builds(wanted)
    for build in builds:
        artifacts.bundle(build)
    if wanted.stock:
        artifacts.bundle(STOCK)
    llama_format = "TQ2_0" if wanted.weights == "ternary" else "Q4_0"
    gguf = llama_file(wanted.llama_bench, artifacts, llama_format, lineup.notes)
    folder = _openvino_ir(wanted, artifacts, lineup.notes)
    artifacts.finish()
    try:
        for build in builds:
            attention = "" if build.attention == "auto" else f", {build.attention}"
            label = f"ours, native {build.label}{attention}"
            _add_ours(lineup, label, artifacts.bundle(build), wanted.threads, native=True)
        if wanted.stock:
            label = f"ours, stock (OpenVINO) {STOCK.label}"
            _add_ours(lineup, label, artifacts.bundle(STOCK), wanted.threads, native=False)
        if gguf is not None and wanted.llama_bench is not None:
            for flash in (0, 1):
                lineup.peers.append(
                    LlamaCppPeer(wanted.llama_bench, gguf, llama_format, wanted.threads, flash)
                )
        if folder is not None:
            vocab_size = artifacts.shape.vocab_size
            lineup.peers.append(
                OpenVinoIrPeer("OpenVINO IR", folder, wanted.threads, vocab_size, wanted.openvino_python)
            )
    except BaseException:
        lineup.close()
        raise
    return lineup


def native_builds(wanted: Wanted) -> list[Build]:
    """Our native rows: the format asked for, and int4 beside ternary."""
    formats = [TERNARY, INT4] if wanted.weights == "ternary" else [INT4]
    return [
        Build(weight_format=each.weight_format, group_size=each.group_size, attention=wanted.attention)
        for each in formats
    ]


def _add_ours(lineup: Lineup, label: str, path: Path, threads: int, *, native: bool) -> None:
    bundle = open_bundle(path)
    engine = open_engine(bundle, threads=threads)
    lineup.peers.append(OurPeer(label, engine, bundle.manifest.vocab_size))
    if native:
        lineup.bundles[label] = bundle


def llama_file(binary: Path | None, artifacts: Artifacts, format_: str, notes: list[str]) -> Path | None:
    """The GGUF for a ``llama-bench`` that was given, else None and a note."""
    if binary is None:
        notes.append("llama.cpp was not measured: give --llama-bench PATH")
        return None
    from cpm_edge.benchmarks.peers.gguf_file import unsupported

    reason = unsupported(artifacts.shape.config, format_)
    if reason is not None:
        notes.append(f"llama.cpp was not measured: {reason}")
        return None
    return artifacts.gguf(format_)


def _openvino_ir(wanted: Wanted, artifacts: Artifacts, notes: list[str]) -> Path | None:
    folder = wanted.openvino_ir
    if wanted.optimum_cli is not None and not (folder and folder.exists()):
        folder = folder or artifacts.folder / "optimum-ir"
        if not folder.exists():
            export_with_optimum(wanted.optimum_cli, artifacts.llama_checkpoint(), folder)
    if folder is None:
        notes.append("no other OpenVINO IR was measured: give --openvino-ir DIR or --optimum-cli PATH")
    return folder


def optimum_command(cli: Path, checkpoint: Path, output: Path) -> list[str]:
    """How optimum-intel makes an int4 IR of the kind that our stock flavour is."""
    return [
        *[str(cli), "export", "openvino", "-m", str(checkpoint), "--weight-format", "int4"],
        *["--task", "text-generation-with-past", "--group-size", "128", "--ratio", "1.0", "--sym"],
        str(output),
    ]


def export_with_optimum(cli: Path, checkpoint: Path, folder: Path) -> None:
    """Make ``folder``, whole or not at all.

    Raises:
        BenchError: optimum-cli failed; ends with what it printed last.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    with Progress().stage("Exporting with optimum-intel"):
        done = subprocess.run(
            optimum_command(cli, checkpoint, partial), capture_output=True, text=True, check=False
        )
    if done.returncode:
        tail = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise BenchError(f"optimum-cli failed with status {done.returncode}: {tail}")
    partial.rename(folder)

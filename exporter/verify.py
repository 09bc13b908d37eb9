"""Does a bundle compute what the model computes? Run in a child process: its memory is its own.

The same tokens go through the traced modules, a layer in memory at a time, and through the bundle's runtime,
as a prefill and as decode steps. The modules run on the weights as the bundle stores them, so a difference is
an error of the graph or the engine; against the checkpoint's own weights it is what quantization costs.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.options import ENGINES, ExportOptions
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import Scheme
from cpm_edge.quant.formats import scheme_from_json
from cpm_edge.runtimes.bundle import Bundle, Manifest
from cpm_edge.runtimes.cache_layout import kv_layers
from cpm_edge.runtimes.session import Engine
from cpm_edge.runtimes.sparsity import MlpSparsity

if TYPE_CHECKING:
    from cpm_edge.exporter.calibration.run import Calibrated

FloatArray = npt.NDArray[np.float32]

DECODE_STEPS = 8
TEXT = (
    "A lighthouse keeper wrote down the weather every morning for forty years. Most lines are short: "
    "wind from the west, rain before noon, clear at night. Read one after another they become a history "
    "of the coast. "
    "小镇的人们每天清晨都会听到钟声，孩子们沿着河边走去上学。def area(width, height): return width * height"
)

# Smallest row cosine and largest relative error of a layer's keys or state that still count as the same.
_LIMITS = {"float32": (0.9999, 1e-3), "float16": (0.999, 3e-2), "int8": (0.97, 0.5)}


def verify_in_child(
    options: ExportOptions,
    bundle: Bundle,
    weights: ModelWeights | None = None,
    calibration: Calibrated | None = None,
) -> dict[str, Any]:
    """Compare a bundle with its checkpoint; its manifest need not be written yet.

    Args:
        options: of the export.
        bundle: what was made.
        weights: those of the export: what they found need not be looked for once more.
        calibration: what the integers come from, if it is not the checkpoint.

    Returns:
        The manifest's ``verification`` entry.

    Raises:
        ExportError: the bundle diverges, or the comparison could not run.
    """
    job: dict[str, Any] = {
        "options": {**dataclasses.asdict(options), "output": str(options.output)},
        "folder": str(bundle.path.resolve()),
        "manifest": bundle.manifest.to_json(),
        "found": {},
        "own": [],
        "calibration": None,
    }
    if weights is not None:
        job["found"] = {name: scheme.to_json() for name, scheme in weights.found.items()}
        job["own"] = sorted(weights.own)
    if calibration is not None:
        folder = str(calibration.folder.resolve())
        job["calibration"] = {"folder": folder, "kept": calibration.record["int8"]}
    # -P: without it Python would import modules that lie in the current folder, which may be a checkpoint.
    command = [sys.executable, "-P", "-m", "cpm_edge.exporter.verify"]
    child = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if child.returncode:
        reason = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise ExportError(
            f"the verification could not run: {reason[0]}", hint="--no-verify exports without it"
        )
    report: dict[str, Any] = json.loads(child.stdout)
    if not report["passed"]:
        layer, measure = report["first_diverging_layer"], report["judged_by"]
        where = "the head" if layer is None else f"layer {layer}"
        raise ExportError(
            f"the bundle does not compute what the model does: {measure.replace('_', ' ')} "
            f"{report[measure]:.6f}, expected at least {report['expected_cosine']}; "
            f"it first diverges in {where}",
            hint="please report this with the model's config.json",
        )
    return report


def verify(
    options: ExportOptions,
    bundle: Bundle,
    found: Mapping[str, Scheme] | None = None,
    own: Iterable[str] = (),
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The comparison itself; see ``verify_in_child``.

    Args:
        found, own: those of ``ModelWeights``.
        calibration: its ``folder``, and the names of the matrices that it ``kept`` in floats.
    """
    from cpm_edge.exporter.checkpoint import open_checkpoint
    from cpm_edge.exporter.eager import run_streamed
    from cpm_edge.exporter.export import prepare

    with open_checkpoint(options.model, revision=options.revision) as source_checkpoint:
        checkpoint = source_checkpoint
        if calibration is not None:
            from cpm_edge.exporter.calibration.run import reopen

            _, checkpoint = reopen(checkpoint, Path(calibration["folder"]), "", calibration["kept"])
        plan = prepare(options, checkpoint)
        rope = plan.config.rope.table(plan.max_context)
        shapes = {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
        constants = {"rotary.inv_freq": rope.inv_freq}
        shapes.update({name: array.shape for name, array in constants.items()})
        weights = ModelWeights(checkpoint, shapes, constants, plan.policy, plan.taken)
        weights.found.update(found or {})
        weights.own.update(own)
        tokens = _tokens(bundle.path, plan.config.vocab_size, min(options.verify_tokens, plan.max_context))

        def read_source(name: str) -> FloatArray:
            return constants[name] if name in constants else source_checkpoint.read(name)

        model = (plan.architecture.model_class(), plan.config, rope)
        stored = run_streamed(*model, weights.dequantized, tokens)
        source = run_streamed(*model, read_source, tokens)
    logits, keys, sparsity = _run_bundle(bundle, tokens)
    precision = str(bundle.manifest.cache["dtype"])
    if bundle.manifest.weights["activations"] == "int8" or precision == "uint8":
        precision = "int8"
    least_cosine, key_error = _LIMITS[precision]
    report = compare(stored.logits, logits)
    decoded, sparse_rows = min(DECODE_STEPS, len(tokens) - 1), _sparse_rows(bundle, len(tokens))
    report["median_cosine"] = median_cosine(stored.logits, logits, decoded, sparse_rows)
    # Rows in which rounding turned a choice differ without an error, but fewer than half of them. int8
    # activations, and float16 queries and pooled keys, round enough to turn the choice of blocks too.
    rounded = precision == "int8" or bundle.manifest.target in ENGINES
    choosing = plan.config.makes_choices or (sparse_rows > 0 and rounded)
    judged_by = "median_cosine" if choosing else "cosine"
    layer_errors = [relative_error(a, b) for a, b in zip(stored.keys, keys, strict=True)]
    diverging = next((i for i, e in enumerate(layer_errors) if not e <= key_error), None)
    return {
        "passed": report[judged_by] >= least_cosine,
        "judged_by": judged_by,
        "tokens": len(tokens),
        "decoded": decoded,
        "sparse_rows": sparse_rows,
        **report,
        "expected_cosine": least_cosine,
        "first_diverging_layer": diverging,
        "largest_key_error": max(layer_errors),
        "mlp_sparsity": sparsity and sparsity.to_json(),
        "against_checkpoint": compare(source.logits, logits),
    }


def _sparse_rows(bundle: Bundle, tokens: int) -> int:
    """Compared positions whose attention was sparse."""
    dense_len = bundle.manifest.context.dense_len
    return 0 if dense_len is None else max(tokens - max(dense_len - 1, 0), 0)


def compare(expected: FloatArray, got: FloatArray) -> dict[str, float]:
    """How close two sets of logits (T, vocab) are: smallest row cosine, max abs, KL, top-1 agreement."""
    a, b = expected.astype(np.float64), got.astype(np.float64)
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    return {
        "cosine": float(_cosines(a, b).min()),
        "max_abs": float(np.abs(a - b).max()),
        "logit_std": float(a.std()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
        "top1": float((a.argmax(1) == b.argmax(1)).mean()),
    }


def median_cosine(expected: FloatArray, got: FloatArray, decoded: int, sparse_rows: int = 0) -> float:
    """The median row cosine of logits (T, vocab) in the part of the rows where it is least.

    The last ``decoded`` rows are a part, and so are the last ``sparse_rows`` without those and the rest: each
    has code of its own, which an error may spoil alone.
    """
    cosines = _cosines(expected.astype(np.float64), got.astype(np.float64))
    parts = np.split(cosines, sorted([len(cosines) - decoded, len(cosines) - sparse_rows]))
    return float(min(np.median(part) for part in parts if len(part)))


def _cosines(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return result


def relative_error(expected: FloatArray, got: FloatArray) -> float:
    """L2 norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(expected - got) / np.linalg.norm(expected))


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _tokens(folder: Path, vocab_size: int, count: int) -> list[int]:
    import tokenizers

    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    ids = [token for token in ids if token < vocab_size] or [0]
    return (ids * (count // len(ids) + 1))[:count]


def _run_bundle(bundle: Bundle, tokens: list[int]) -> tuple[FloatArray, list[FloatArray], MlpSparsity | None]:
    """Logits of all tokens, keys or states of all layers, and what the decode steps left out of the MLPs."""
    engine = _open(bundle)
    with engine.session() as session:
        split = max(len(tokens) - DECODE_STEPS, 1)
        rows = [session.forward(tokens[:split], logits="all").copy()]
        rows += [session.forward([token])[None] for token in tokens[split:]]
        with_keys = set(kv_layers(bundle.manifest.cache))
        keys = [
            (session.layer_keys(layer) if layer in with_keys else session.layer_state(layer)).copy()
            for layer in range(bundle.manifest.num_layers)
        ]
        sparsity = session.mlp_sparsity()
    engine.close()
    return np.concatenate(rows), keys, sparsity


def _open(bundle: Bundle) -> Engine:
    """The bundle's runtime, or ONNX Runtime on the graph of an engine that only a device can build."""
    if bundle.manifest.target in ENGINES:
        from cpm_edge.exporter.graph_session import GraphEngine

        return GraphEngine(bundle)
    from cpm_edge.runtimes import open_engine

    return open_engine(bundle, device="CPU")


def _main() -> None:
    job = json.load(sys.stdin)
    options = ExportOptions(**{**job["options"], "output": Path(job["options"]["output"])})
    found = {name: scheme_from_json(fields) for name, fields in job["found"].items()}
    bundle = Bundle(Path(job["folder"]), Manifest.from_json(job["manifest"]))
    report = verify(options, bundle, found, job["own"], job["calibration"])
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    _main()

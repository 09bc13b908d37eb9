"""Calibration as a step of an export: from a plan to a checkpoint that brings its own integers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpm_edge.exporter.calibration.dataset import read_sequences
from cpm_edge.exporter.calibration.driver import PASSES, CalibrationJob, Calibrator, threads
from cpm_edge.exporter.calibration.layout import choose_layout
from cpm_edge.exporter.calibration.matrices import LayerFile
from cpm_edge.exporter.calibration.mixed import Sensitivity, choose_precision
from cpm_edge.exporter.calibration.settings import Settings
from cpm_edge.exporter.calibration.store import CalibratedStore
from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.errors import ExportError, ExportWarning
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from cpm_edge.exporter.weight_format import note_rounded
from cpm_edge.exporter.weights import ModelWeights, tensor_class
from cpm_edge.quant import QuantError, Scheme, TensorClass, WeightFormat
from cpm_edge.quant.hessian import DAMPING

if TYPE_CHECKING:
    from cpm_edge.exporter.export import Plan


@dataclass(frozen=True)
class Calibrated:
    """The outcome of a calibration.

    Attributes:
        checkpoint: the source with the integers in place of its linear layers.
        store: where these are.
        folder: of the intermediate results, which the checkpoint reads.
        record: what the manifest says about it.
        layer_seconds: of each layer that was not finished before; 0 when all were.
        sensitivities: the choice of mixed precision; empty when everything is int4.
    """

    checkpoint: Checkpoint
    store: CalibratedStore
    folder: Path
    record: dict[str, Any]
    layer_seconds: float = 0.0
    sensitivities: list[Sensitivity] = field(default_factory=list)


def calibrate(plan: Plan, folder: Path, progress: Progress) -> Calibrated:
    """Calibrate the checkpoint of a plan.

    Args:
        plan: of an int4 export.
        folder: for intermediate results; an earlier run's are gone on from.

    Warns with ExportWarning when it goes on from there, when it was interrupted, of experts that no token
    reached, and of a dataset with fewer tokens than asked for.

    Raises:
        ExportError: the options or the dataset do not fit; the activations are not finite.
        CheckpointError: a matrix that cannot be quantized.
    """
    _check(plan)
    options = plan.options
    settings = Settings(
        options.method,
        options.calibration_tokens,
        options.ratio,
        plan.architecture.skipped if options.skip_positions is None else options.skip_positions,
        options.act_order,
        DAMPING if options.damping is None else options.damping,
    )
    sequences = read_sequences(
        plan.options.dataset, plan.checkpoint, settings, plan.config.vocab_size, plan.max_context
    )
    length = int(sequences.ids.shape[1])
    if settings.skipped >= length:
        raise ExportError(
            f"--skip-positions: expected fewer than the {length} tokens of a text, got {settings.skipped}",
            hint="a larger --max-context, or --skip-positions 0",
        )
    shapes = _linear_shapes(plan.checkpoint)
    weights = ModelWeights(plan.checkpoint, shapes, {}, plan.policy)
    linear = plan.policy.linear

    def scheme_of(name: str) -> Scheme:
        return weights.scheme(name) if name else linear

    rope = plan.config.rope.table(plan.max_context)
    # Mixed precision might take every odd matrix out, which is not worth hours of calibration.
    _check_layout(options, {name: scheme_of(name) for name in shapes}, shapes)
    note_rounded(weights)
    job = CalibrationJob(
        plan.checkpoint, plan.architecture.model_class(), plan.config, rope, sequences, settings,
        scheme_of, folder, progress.advance,
    )  # fmt: skip
    total = PASSES * sum(int(np.prod(shape)) for shape in shapes.values())
    with progress.weights(f"Calibrating ({settings.method})", total):
        layers, layer_seconds = _run(job)
    sensitivities = _precision(layers, shapes, settings.ratio)
    kept = [row.name for row in sensitivities if row.kept]
    store, checkpoint = reopen(plan.checkpoint, folder, settings.method, kept)
    _check_layout(options, store.schemes, shapes)
    unreached = [name for layer in layers for name in layer.factors.unreached]
    if unreached:
        message = f"no calibration token reached {len(unreached)} matrices of experts, rounded to nearest: "
        warnings.warn(message + ", ".join(unreached[:6]), ExportWarning, stacklevel=2)
    record = {
        **settings.to_json(),
        "tokens": sequences.tokens,
        "sequence_length": length,
        "dataset": sequences.name,
        "dataset_sha256": sequences.sha256,
        "most_damping": max(layer.factors.damping for layer in layers),
        "int8": kept,
        "unreached": unreached,
    }
    return Calibrated(checkpoint, store, folder, record, layer_seconds, sensitivities)


def reopen(
    base: Checkpoint, folder: Path, method: str, kept: Iterable[str] = ()
) -> tuple[CalibratedStore, Checkpoint]:
    """The finished results in a folder, as a checkpoint.

    Args:
        kept: matrices that stay floats.
    """
    layers = [LayerFile(path) for path in sorted(folder.glob("layer-*.safetensors"))]
    store = CalibratedStore(base, layers, method, frozenset(kept))
    return store, base.with_calibration(store)


def _check(plan: Plan) -> None:
    if plan.taken is not None:
        raise ExportError(
            f"--method {plan.options.method}: the layers of {plan.checkpoint.name} are integers already",
            hint="leave --method, --ratio and --save-checkpoint out to keep them; --weight-format int4 with "
            "another group size rounds them again",
        )
    if plan.policy.linear.format is not WeightFormat.INT4:
        raise ExportError(
            f"--method {plan.options.method}: expected int4 layers, got {plan.policy.linear.format.value}",
            hint="--weight-format int4 is what calibration is for",
        )


def _check_layout(
    options: ExportOptions, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if options.save_checkpoint is not None:
        choose_layout(options.method, schemes, shapes)


def _linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(info.shape)
        for name, info in checkpoint.tensors.items()
        if ".layers." in name and tensor_class(name, len(info.shape)) is TensorClass.LINEAR
    }


def _run(job: CalibrationJob) -> tuple[list[LayerFile], float]:
    """The results of all layers, and how long one took (s)."""
    calibrator = Calibrator(job)
    count = job.config.num_hidden_layers
    if calibrator.resumed:
        message = f"the calibration goes on behind layer {calibrator.resumed} of {count}, where a run ended"
        warnings.warn(message, ExportWarning, stacklevel=3)
        _warn_of_threads(calibrator)
    elif calibrator.discarded:
        message = (
            f"the {calibrator.discarded} layers in {job.folder} are of other options; all are done again"
        )
        warnings.warn(message, ExportWarning, stacklevel=3)
    start = time.perf_counter()
    try:
        layers = calibrator.run()
    except QuantError as error:
        raise ExportError(error.message, hint=error.hint) from error
    finally:
        done = len(list(job.folder.glob("layer-*.safetensors")))
        if 0 < done < count:
            message = (
                f"{done} of {count} layers are calibrated; the same command goes on from {job.folder}, and a "
                "removed folder begins anew"
            )
            warnings.warn(message, ExportWarning, stacklevel=3)
    worked = count - calibrator.resumed
    return layers, (time.perf_counter() - start) / worked if worked else 0.0


def _warn_of_threads(calibrator: Calibrator) -> None:
    """Sums have another order with other threads: a few codes then differ from an uninterrupted run's."""
    if calibrator.threads != (now := threads()):
        then, here = (
            " ".join(f"{variable}={count}" for variable, count in run.items())
            for run in (calibrator.threads, now)
        )
        message = (
            f"the finished layers were computed with {then}, this run has {here}: the bytes may differ from "
            "those of an uninterrupted run"
        )
        warnings.warn(message, ExportWarning, stacklevel=4)


def _precision(
    layers: list[LayerFile], shapes: dict[str, tuple[int, ...]], ratio: float
) -> list[Sensitivity]:
    if ratio >= 1:
        return []
    errors = {name: error for layer in layers for name, error in layer.factors.errors.items()}
    weights = {name: int(np.prod(shapes[name])) for name in errors}
    return choose_precision(errors, weights, ratio)

"""The export, on one page: open, trace, settle formats, lower, describe, verify, publish."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpm_edge.exporter.calibration.mixed import Sensitivity
from cpm_edge.exporter.checkpoint import Checkpoint, check_tokenizer, open_checkpoint
from cpm_edge.exporter.configs import LlamaConfig, MiniCPMConfig
from cpm_edge.exporter.disk import disk_errors
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.model_card import model_card
from cpm_edge.exporter.options import ENGINES, ExportOptions
from cpm_edge.exporter.passes.column_order import gather_columns
from cpm_edge.exporter.passes.experts import inline_uneven_experts, inline_whole_experts
from cpm_edge.exporter.progress import Progress
from cpm_edge.exporter.registry import Architecture, find_architecture
from cpm_edge.exporter.taken import Taken
from cpm_edge.exporter.targets.common import BuildJob, Built
from cpm_edge.exporter.targets.engine_options import check_engine_options
from cpm_edge.exporter.verify import verify_in_child
from cpm_edge.exporter.weight_checks import check_groups, warn_of_unused
from cpm_edge.exporter.weight_format import choose_format, note_rounded
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import Policy, QuantError, TensorClass, WeightFormat
from cpm_edge.runtimes.atomic import AtomicFolder
from cpm_edge.runtimes.bundle import Bundle, hash_file, hash_files, write_manifest
from cpm_edge.runtimes.manifest import ContextLimits, Manifest

if TYPE_CHECKING:
    from cpm_edge.exporter.calibration.run import Calibrated

VERSION = importlib.metadata.version("cpm-edge")


@dataclass(frozen=True)
class Plan:
    """An export whose inputs were read and found sound; no weight was read yet."""

    options: ExportOptions
    checkpoint: Checkpoint
    architecture: Architecture
    config: LlamaConfig
    policy: Policy
    max_context: int
    taken: Taken | None = None


@dataclass(frozen=True)
class ExportResult:
    """What was written, how long each stage took (seconds), and which matrices mixed precision chose."""

    folder: Path
    manifest: Manifest
    seconds: dict[str, float]
    sensitivities: list[Sensitivity] = field(default_factory=list)


def export(options: ExportOptions, progress: Progress) -> ExportResult:
    """Export ``options.model`` into the folder ``options.output``, whole or not at all.

    Raises:
        ExportError: and its kinds: the checkpoint, the config, an option, or the disk.
        BundleError: the output folder may not be written.
    """
    seconds: dict[str, float] = {}
    with disk_errors(options.output):
        output = AtomicFolder(options.output, options.overwrite)
        output.check()  # nobody wants to learn that after a download, or after hours of calibration
        if options.save_checkpoint is not None:
            _check_saved(options)
    with open_checkpoint(options.model, revision=options.revision) as checkpoint:
        plan = prepare(options, checkpoint)
        assets = checkpoint.assets()
        check_tokenizer(assets, checkpoint.name)
        calibration = None
        with disk_errors(options.output), output as folder:
            if options.needs_calibration:
                with _timed(seconds, "calibrate"):
                    calibration = _calibrate(plan, progress)
                if calibration.layer_seconds:
                    seconds["a layer"] = round(calibration.layer_seconds, 3)
                plan = prepare(options.after_calibration(), calibration.checkpoint)
            _copy_assets(assets, checkpoint, folder)
            with progress.stage("Tracing the model"), _timed(seconds, "trace"):
                job = _trace(plan, folder, progress)
            elements = sum(map(job.weights.elements, job.weights.shapes))
            with progress.weights("Settling formats", elements), _timed(seconds, "settle"):
                job.weights.find_schemes(progress.advance)
                check_groups(plan.options, job.weights)
                note_rounded(job.weights)
                if options.target in ENGINES:
                    inline_whole_experts(job.model)
                elif job.flavour != "native":  # whose kernels bring tensors to one format
                    inline_uneven_experts(job.model, job.weights)
                gather_columns(job.model.graph, job.weights)
            with progress.weights("Converting weights", elements), _timed(seconds, "lower"):
                built = _target(options.target).build(job)
            with progress.stage("Hashing the files"), _timed(seconds, "describe"):
                manifest = _manifest(plan, job.weights, built, calibration)
                manifest = dataclasses.replace(manifest, files=hash_files(folder))
            if options.verify:
                with progress.stage("Verifying the bundle"), _timed(seconds, "verify"):
                    report = verify_in_child(plan.options, Bundle(folder, manifest), job.weights, calibration)
                manifest = dataclasses.replace(manifest, verification=report)
            card = folder / "README.md"
            card.write_text(model_card(manifest), encoding="utf-8")
            files = dict(sorted({**manifest.files, card.name: hash_file(card)}.items()))
            manifest = dataclasses.replace(manifest, files=files)
            write_manifest(folder, manifest)
            if calibration is not None:
                _save(calibration, options, progress)
        if calibration is not None:
            shutil.rmtree(calibration.folder)
        return ExportResult(
            options.output, manifest, seconds, [] if calibration is None else calibration.sensitivities
        )


def _calibrate(plan: Plan, progress: Progress) -> Calibrated:
    from cpm_edge.exporter.calibration.run import calibrate

    output = plan.options.output
    return calibrate(plan, output.parent / f".{output.name}.calibration", progress)


def _save(calibration: Calibrated, options: ExportOptions, progress: Progress) -> None:
    from cpm_edge.exporter.calibration.save import save_checkpoint

    if options.save_checkpoint is not None:
        save_checkpoint(calibration, options.save_checkpoint, progress, options.overwrite)


def _check_saved(options: ExportOptions) -> None:
    from cpm_edge.exporter.calibration.save import output_of

    assert options.save_checkpoint is not None
    output_of(options.save_checkpoint, options.overwrite).check()


def prepare(options: ExportOptions, checkpoint: Checkpoint) -> Plan:
    """Read the config and settle every choice that needs no more than a few sampled rows of weights.

    Raises:
        ConfigError: an unknown architecture or an unimplemented value.
        ExportError: options that contradict each other or the model.
    """
    architecture = find_architecture(checkpoint.config)
    config = architecture.config.from_dict(checkpoint.config)
    if isinstance(config, MiniCPMConfig):
        config = config.with_attention(options.attention)
        config.attention_spec(0)
    elif options.attention == "sparse":
        raise ExportError(
            f"--attention sparse: expected an architecture trained for InfLLM-V2, got {architecture.name}",
            hint="leave --attention out",
        )
    longest = config.max_context
    max_context = options.max_context or longest
    if max_context > longest:
        raise ExportError(
            f"--max-context: expected at most {longest} (max_position_embeddings of the checkpoint), "
            f"got {max_context}",
            hint="a longer context needs a rope_scaling made for it in config.json",
        )
    weight_format, taken = choose_format(options, checkpoint)
    options = dataclasses.replace(options, weight_format=weight_format.value)
    policy = _policy(options, config)
    if options.target in ENGINES:
        schemes = {"weight": policy.linear, "embedding": policy.embedding, "head": policy.head}
        check_engine_options(options, {kind: each.format.value for kind, each in schemes.items()}, config)
    return Plan(options, checkpoint, architecture, config, policy, max_context, taken)


def _policy(options: ExportOptions, config: LlamaConfig) -> Policy:
    weight_format = WeightFormat(options.weight_format)
    optional = {"embedding": options.embedding_format, "head": options.head_format}
    try:
        return Policy.for_format(
            weight_format,
            None if weight_format is WeightFormat.TERNARY else options.group_size,
            options.symmetric,
            tied=config.tie_word_embeddings,
            **{key: WeightFormat(value) for key, value in optional.items() if value},
        )
    except QuantError as error:
        raise ExportError(error.message, hint=error.hint) from error


def _trace(plan: Plan, folder: Path, progress: Progress) -> BuildJob:
    from cpm_edge.exporter.trace import trace

    rope = plan.config.rope.table(plan.max_context)
    model = trace(plan.architecture.model_class(), plan.config, rope)
    weights = model_weights(plan, model)
    weights.check()
    warn_of_unused(weights, plan.config.tie_word_embeddings)
    return BuildJob(
        model=model,
        config=plan.config,
        checkpoint=plan.checkpoint,
        weights=weights,
        folder=folder,
        max_context=plan.max_context,
        kv_cache=plan.options.kv_cache,
        activations=plan.options.activations,
        flavour=plan.options.resolved_flavour,
        target=plan.options.target,
        chip=plan.options.chip,
        progress=progress.advance,
    )


def model_weights(plan: Plan, model: Any) -> ModelWeights:
    """The weights that the traced graph names, with the plan's policy."""
    shapes = {
        name: tuple(int(d) for d in value.shape)
        for name, value in model.graph.initializers.items()
        if value.const_value is None
    }
    constants = {"rotary.inv_freq": np.asarray(plan.config.rope.table(plan.max_context).inv_freq)}
    return ModelWeights(plan.checkpoint, shapes, constants, plan.policy, plan.taken)


def _target(name: str) -> Any:
    return importlib.import_module(f"cpm_edge.exporter.targets.{name}")


def _copy_assets(assets: dict[str, Any], checkpoint: Checkpoint, folder: Path) -> None:
    import json

    for name, content in assets.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
    config = json.dumps(checkpoint.config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")


def _manifest(plan: Plan, weights: ModelWeights, built: Built, calibration: Calibrated | None) -> Manifest:
    config, spec = plan.config, plan.config.attention_spec(0)
    rope = config.rope.table(plan.max_context)
    linear, other_groups = weights.linear_scheme()
    return Manifest(
        producer=f"cpm-edge {VERSION}",
        target=plan.options.target,
        architecture=plan.architecture.name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        context=ContextLimits(
            max_context=plan.max_context,
            dense_len=None if spec.is_dense else spec.dense_len,
            trained_context=config.max_position_embeddings,
            rope={"type": config.rope.kind, "choice": rope.note},
        ),
        engine=built.engine,
        files={},
        source=plan.checkpoint.fingerprint(),
        weights={
            "linear": linear.describe(),
            "linear_parameters": weights.linear_parameters(),
            "linear_bytes": weights.stored_bytes[TensorClass.LINEAR],
            "embedding": plan.policy.embedding.describe(),
            "head": weights.head_scheme().describe(),
            "absorbed": weights.absorbed_format(),
            "activations": built.activations,
            "other_groups": other_groups,
            "taken_from": {} if calibration else weights.taken_from(),
            "calibration": calibration and calibration.record,
        },
        ops=built.ops,
        cache=built.cache,
        attention={"sparse": not spec.is_dense, "head_dim": built.cache["head_dim"], **spec.attributes()},
        flavour=built.flavour,
        chip=plan.options.chip,
    )


class _timed:  # noqa: N801 - reads as a statement: with _timed(seconds, "trace")
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds = seconds
        self._name = name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = round(time.perf_counter() - self._start, 3)


__all__ = ["ExportResult", "Plan", "export", "model_weights", "prepare"]

"""``cpm-export --plan``: what an export would give, from config.json alone."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cpm_edge.benchmarks.plan import Plan, PlanError, Question, plan
from cpm_edge.benchmarks.plan.text import missing, rows, to_json
from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.console import warnings_printed
from cpm_edge.exporter.errors import ExportError, ExportWarning
from cpm_edge.exporter.options import ENGINES, FLAVOURS, ExportOptions
from cpm_edge.exporter.registry import find_architecture
from cpm_edge.exporter.targets.engine_options import check_engine_options

WIDTH = 120
_FORMATS = (("weight", "linear"), ("embedding", "embedding"), ("head", "head"))
LEAST_GIGABYTES, MOST_GIGABYTES = 0.01, 1e6


def run_plan(
    arguments: Mapping[str, Any], *, chip: str, memory: float | None, device: str | None, as_json: bool
) -> None:
    """Print a plan.

    Args:
        arguments: options of ``cpm-export`` by name.
        chip: an id, or auto.
        memory: gigabytes of the machine, in place of the chip's.

    Raises:
        ExportError: it cannot be planned, or it does not fit; the hint has what would make it fit.
    """
    if memory is not None and not LEAST_GIGABYTES <= memory <= MOST_GIGABYTES:
        limits = f"{LEAST_GIGABYTES:g} to {MOST_GIGABYTES:g}"
        raise ExportError(f"--memory: expected {limits} gigabytes, got {memory:g}")
    if not chip:
        raise ExportError(
            "--chip: expected an id, auto or this-machine", hint="cpm-bench chips lists the ids"
        )
    if arguments["ratio"] < 1:
        raise ExportError(
            f"--ratio {arguments['ratio']:g}: only the calibration tells which matrices become int8",
            hint="plan --weight-format int4 and --weight-format int8: the bundle lies between",
        )
    config = read_config(arguments["model"], arguments["revision"])
    with warnings_printed():  # refuses what the exporter does not implement
        parsed = find_architecture(config).config.from_dict(config)
        if "quantization_config" in config:
            from cpm_edge.exporter.checkpoint.quantization import read_quantization

            read_quantization(config, Path(arguments["model"]))
    arguments = {**arguments, **_own_format(arguments)}
    names = {field.name for field in dataclasses.fields(Question)} & arguments.keys()
    question = Question(
        **{name: arguments[name] for name in names} | {"flavour": arguments["flavour"] or FLAVOURS[0]},
        context=arguments["max_context"],
        memory=None if memory is None else int(memory * 1e9),
        device=device,
    )
    try:
        answer = plan(config, chip, question)
    except PlanError as error:
        raise ExportError(error.message, hint=error.hint) from error
    if answer.target in ENGINES:
        _check_engine(arguments, answer, parsed)
    if arguments["method"] != "rtn":
        _warn(
            f"--method {arguments['method']}: the export's memory is without that of calibration, which "
            "holds a layer and what it computes (docs/quantization.md)"
        )
    _print(answer, as_json)
    if answer.fits is False:
        raise ExportError(f"does not fit: it takes {missing(answer)}", hint=_changes(answer))


def _own_format(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--weight-format auto`` comes to for weights that are at hand; a config alone does not tell."""
    path = Path(arguments["model"]).expanduser()
    has_weights = path.suffix.lower() == ".gguf" or any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    if arguments["weight_format"] != "auto" or not path.exists() or not has_weights:
        return {}
    # Imported here: they take longer than a plan of a config alone.
    from cpm_edge.exporter.checkpoint.open import open_checkpoint
    from cpm_edge.exporter.weight_format import choose_format

    options = ExportOptions(**{**arguments, "target": arguments["target"] or "ort"})
    with open_checkpoint(arguments["model"]) as checkpoint:
        own = choose_format(options, checkpoint).format.value
    return {} if own == "int4" else {"weight_format": own}  # of int4 the config may know the groups


def _check_engine(arguments: Mapping[str, Any], answer: Plan, config: LlamaConfig) -> None:
    """Refuse what the export would; without --flavour, say which one the export has to be told."""
    options = ExportOptions(**{**arguments, "target": answer.target}, chip=answer.chip.id)
    formats = {kind: getattr(answer.formats, name).name for kind, name in _FORMATS}
    try:
        check_engine_options(options, formats, config)
    except ExportError as error:
        if options.flavour is not None or not config.attention_spec(0).is_latent:
            raise
        check_engine_options(dataclasses.replace(options, flavour="stock"), formats, config)
        _warn(f"the export needs --flavour stock: {error.message}")


def _warn(text: str) -> None:
    with warnings_printed():
        warnings.warn(ExportWarning(text), stacklevel=2)


def read_config(ref: str, revision: str | None) -> dict[str, Any]:
    """The parsed config.json of what ``--model`` names; nothing else is read or downloaded.

    Raises:
        ExportError: there is none.
    """
    from cpm_edge.exporter.checkpoint.hub import download_config
    from cpm_edge.exporter.checkpoint.open import HUB_ID, open_checkpoint

    path = Path(ref).expanduser()
    if path.suffix.lower() == ".gguf" or (not path.exists() and not HUB_ID.fullmatch(ref)):
        with open_checkpoint(ref) as checkpoint:
            return dict(checkpoint.config)
    if not path.exists():
        path = download_config(ref, revision)
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{file}: expected a config.json: {error}",
            hint="a plan needs the config alone: a checkpoint's folder, or the file itself",
        ) from error
    if not isinstance(content, dict):
        raise ExportError(f"{file}: expected an object, got {type(content).__name__}")
    return content


def _print(answer: Plan, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(to_json(answer), indent=2))
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, value in rows(answer):
        table.add_row(name, value)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=WIDTH, highlight=False)
    console.print(table)


def _changes(answer: Plan) -> str:
    if not answer.advice:
        return "a smaller model, or another chip: no three options make it fit, not even with a short context"
    return "one of: " + "; ".join(each.option for each in answer.advice)

"""From a bundle's ONNX graph to a serialized engine, with TensorRT on the device or TensorRT-RTX anywhere.

The graph's contract: every dimension is static but T (tokens of a step) and R (rows that get logits), which
only ``inputs_embeds``, ``input_ids`` and ``logit_rows`` have. Positions are data, never shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpm_edge.runtimes.errors import BackendError, BundleError
from cpm_edge.runtimes.onnx_wire import ExternalTensor, external_tensors, uses, with_inputs
from cpm_edge.runtimes.tensorrt.api import Api
from cpm_edge.runtimes.tensorrt.memory import Placement
from cpm_edge.runtimes.tensorrt.progress import BuildProgress

if TYPE_CHECKING:
    import tensorrt as trt

PREFILL, DECODE = 0, 1  # indices of the optimization profiles
TOKEN_INPUTS = ("inputs_embeds", "input_ids")
ROWS_INPUT = "logit_rows"
ALIASED_IO = "ALIASED_PLUGIN_IO_10_03"  # its number differs between releases, its name does not
_LEAST_INPUT = 1 << 20  # bytes; smaller weights are no matter of memory
_LOGIT_BYTES = 32 << 20  # of one step at most: what keeps R below T
# Where a weight may come from outside, beside our plugins: operator and index of its input. Not codes under
# DequantizeLinear: TensorRT-RTX 1.7.1 does not compile blocked ones that are inputs (quantize_lowering).
_FREE_INPUTS = {("MatMul", 0), ("MatMul", 1), ("Gather", 0), ("Transpose", 0)}
_OUR_PREFIX = "Cpm"


@dataclass(frozen=True)
class BuildSpec:
    """What to build.

    Attributes:
        model: the ONNX file; its external data lies beside it.
        prefill_chunk: most tokens of a step.
        vocab_size: columns of the logits, float32.
        workspace: bytes of scratch that one layer may ask for; TensorRT only. TensorRT-RTX 1.7.1 refuses some
            layers under any limit ("OutOfMemory", requested: the limit and a little more), and none without.
        aliased: outputs of plugins lie in the memory of their inputs.
        placement: where the weights go.
        sms: compute capabilities to build for, such as (86, 89), without a GPU; TensorRT-RTX only. Empty: for
            the GPU of this machine.
    """

    model: Path
    prefill_chunk: int
    vocab_size: int
    workspace: int
    aliased: bool = False
    placement: Placement = Placement.ENGINE
    sms: tuple[int, ...] = ()

    @property
    def most_logit_rows(self) -> int:
        """R of the prefill profile: rows of float32 logits within 32 MiB, at most a chunk."""
        return max(1, min(self.prefill_chunk, _LOGIT_BYTES // (4 * self.vocab_size)))


@dataclass(frozen=True)
class Built:
    """A serialized engine (a buffer), and the weights that are inputs of it instead of lying inside."""

    plan: trt.IHostMemory
    weights: tuple[ExternalTensor, ...]


def build_engine(api: Api, spec: BuildSpec, *, timing_cache: Path | None = None) -> Built:
    """Parse, optimize, serialize. A rich progress bar shows the builder's phases on a terminal.

    Args:
        timing_cache: a file that is read and written, so that the next build measures less.

    Raises:
        BundleError: the graph breaks its contract, or the parser refuses it.
        BackendError: the builder fails; with its last lines.
    """
    api.log.clear()
    module = api.module
    builder: trt.Builder = module.Builder(api.logger)
    network: trt.INetworkDefinition = builder.create_network(_strongly_typed(module))
    parser: trt.OnnxParser = module.OnnxParser(network, api.logger)
    weights = _parse(api, parser, spec)
    config: trt.IBuilderConfig = builder.create_builder_config()
    _configure(api, config, spec)
    for profile in _profiles(builder, network, spec):
        config.add_optimization_profile(profile)
    _load_timings(config, timing_cache)
    with BuildProgress(module) as progress:
        config.progress_monitor = progress.monitor
        plan: trt.IHostMemory | None = builder.build_serialized_network(network, config)
    if progress.interrupted or api.log.interrupted:
        api.log.interrupted = False
        raise KeyboardInterrupt
    if plan is None:
        raise _build_error(api, spec)
    _save_timings(config, timing_cache)
    return Built(plan, weights)


def input_weights(model: bytes) -> tuple[ExternalTensor, ...]:
    """The large initializers that the graph may take as inputs instead: those all of whose uses allow it."""
    large = {tensor.name: tensor for tensor in external_tensors(model) if tensor.nbytes >= _LEAST_INPUT}
    seen: dict[str, bool] = {}
    for use in uses(model):
        if use.name in large:
            free = use.op_type.startswith(_OUR_PREFIX) or (use.op_type, use.index) in _FREE_INPUTS
            seen[use.name] = seen.get(use.name, True) and free
    return tuple(tensor for name, tensor in large.items() if seen.get(name))


def _strongly_typed(module: Any) -> int:
    # From TensorRT 11 on every network is, and the flag may be gone.
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(api: Api, parser: trt.OnnxParser, spec: BuildSpec) -> tuple[ExternalTensor, ...]:
    model = spec.model.read_bytes()
    weights: tuple[ExternalTensor, ...] = ()
    if spec.placement is Placement.INPUTS:
        weights = input_weights(model)
        names = {tensor.name for tensor in weights}
        model = with_inputs(model, names.__contains__)
    if parser.parse(model, str(spec.model)):
        return weights
    lines = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
    raise BundleError(
        f"{api.name} {api.version} cannot parse {spec.model.name}:"
        + "".join(f"\n  {line}" for line in dict.fromkeys(lines))
        + ("" if lines else api.log.text() or " it does not say why"),
        hint=_parser_hint(lines),
    )


def _describe(error: trt.ParserError) -> str:
    where = f" {error.node_name()!r}" if error.node_name() else ""
    return f"{error.node_operator() or 'node'}{where}: {' '.join(error.desc().split())}"


def _parser_hint(lines: list[str]) -> str:
    if any("plugin" in line.lower() for line in lines):
        return (
            "An operator is neither TensorRT's nor a plugin of this bundle: see 'Plugin not found' in "
            "docs/jetson.md, or export with --flavour stock."
        )
    return "The graph needs a newer engine (see engine.requires in cpm_edge.json), or another export."


def _configure(api: Api, config: trt.IBuilderConfig, spec: BuildSpec) -> None:
    module = api.module
    if not api.is_rtx:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, spec.workspace)
    if spec.aliased:
        feature = getattr(module.PreviewFeature, ALIASED_IO, None)
        if feature is None:
            raise BackendError(
                f"{api.name}: expected a version with plugins that write in place (10.3 or newer), "
                f"got {api.version}",
                hint="Install JetPack 6.1 or newer, or export with --flavour stock.",
            )
        config.set_preview_feature(feature, True)
    if spec.placement is Placement.STREAMED:
        config.set_flag(module.BuilderFlag.WEIGHT_STREAMING)
    if spec.sms:
        _set_capabilities(api, config, spec.sms)


def _set_capabilities(api: Api, config: Any, sms: tuple[int, ...]) -> None:
    known = getattr(api.module, "ComputeCapability", None)
    if known is None:
        raise BackendError(
            f"{api.name} {api.version} builds for the GPU of its machine only, not for SM {sms}",
            hint="Build on the device: cpm-run BUNDLE --build-only",
        )
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        capability = getattr(known, f"SM{sm}", None)
        if capability is None:
            names = sorted(int(name[2:]) for name in dir(known) if name.startswith("SM"))
            raise BackendError(
                f"{api.name} {api.version}: expected a compute capability of {names}, got {sm}",
                hint="On this GPU export with --target ort and run with --device cuda.",
            )
        config.set_compute_capability(capability, index)


def _profiles(
    builder: trt.Builder, network: trt.INetworkDefinition, spec: BuildSpec
) -> list[trt.IOptimizationProfile]:
    prefill, decode = builder.create_optimization_profile(), builder.create_optimization_profile()
    most = {ROWS_INPUT: (1, spec.most_logit_rows), **dict.fromkeys(TOKEN_INPUTS, (spec.prefill_chunk,) * 2)}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        _check_input(tensor)
        shape = dimensions(tensor.shape)
        if -1 in shape:
            opt, largest = most[tensor.name]
            ones, opts, mosts = (_filled(shape, value) for value in (1, opt, largest))
            prefill.set_shape(tensor.name, ones, opts, mosts)
            decode.set_shape(tensor.name, ones, ones, ones)
    return [prefill, decode]


def _check_input(tensor: trt.ITensor) -> None:
    shape = dimensions(tensor.shape)
    if shape.count(-1) > (tensor.name in (*TOKEN_INPUTS, ROWS_INPUT)):
        raise BundleError(
            f"input {tensor.name}: expected a static shape (only the tokens and the rows of logits of a step "
            f"are dynamic), got {list(shape)}",
            hint="Export the bundle again.",
        )
    if tensor.is_shape_tensor:
        raise BundleError(
            f"input {tensor.name}: its values decide shapes, which a captured decode step cannot follow",
            hint="Export the bundle again.",
        )


def dimensions(dims: Any) -> tuple[int, ...]:
    """A tensorrt.Dims, which is iterable, as a tuple; its type information does not say so."""
    return tuple(int(dim) for dim in dims)


def _filled(shape: tuple[int, ...], value: int) -> Any:
    return tuple(value if dim == -1 else dim for dim in shape)


def _load_timings(config: trt.IBuilderConfig, path: Path | None) -> None:
    if path is None:
        return
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    # A damaged file gives none, one of another board of the same compute capability is refused: begin anew.
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _save_timings(config: trt.IBuilderConfig, path: Path | None) -> None:
    cache: trt.ITimingCache | None = config.get_timing_cache() if path else None
    if path is not None and cache is not None:
        draft = path.with_suffix(".draft")
        draft.write_bytes(memoryview(cache.serialize()))
        draft.replace(path)


# What the builder's log says, and what helps.
_ADVICE: list[tuple[str, str]] = [
    (
        "out of memory",
        "Close other programs, add swap, or build with fewer programs running: see 'out of memory' in "
        "docs/jetson.md.",
    ),
    ("could not find any implementation", "See 'Could not find any implementation' in docs/jetson.md."),
    ("alias", "Plugins that write in place need TensorRT 10.3 or newer; else export with --flavour stock."),
]


def _build_error(api: Api, spec: BuildSpec) -> BackendError:
    hint = next((advice for phrase, advice in _ADVICE if api.log.has(phrase)), None)
    return BackendError(
        f"{api.name} {api.version} cannot build an engine of {spec.model.name}"
        + (api.log.text() or ": it does not say why"),
        hint=hint or "Please report this with the lines above and cpm_edge.json.",
    )

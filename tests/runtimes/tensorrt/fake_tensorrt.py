"""The module ``tensorrt`` on ONNX Runtime: engines compute for real, from and to addresses of FakeCuda.

A plan is a line of JSON and the ONNX model. Steps are put on the stream like kernels: they read and write
when it is waited for, at the addresses that were bound when they were put there.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.external_data_helper import load_external_data_for_model

from tests.runtimes.tensorrt.fake_cuda import FakeCuda

TYPES: dict[int, Any] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.INT32: np.int32,
    onnx.TensorProto.INT8: np.int8,
}


class Severities(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class Logger:
    Severity = Severities

    def log(self, severity: Severities, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class PreviewFeature(enum.Enum):
    ALIASED_PLUGIN_IO_10_03 = 5


class BuilderFlag(enum.Enum):
    WEIGHT_STREAMING = 9


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class FakeTensorRt:
    """The module. Everything that a test wants to see or to break is an attribute.

    Attributes:
        last_config: of the newest build; parse_errors, build_errors: what makes them fail, if not empty.
        libraries: path of loaded plugin libraries; creators: names that a library registers.
        honour_aliases: engines write where the output was bound, as plugins with aliased outputs demand.
        lower: what the parser does with operators of ours.
        refuse_capture: what a step says while the stream is captured; empty to allow it.
    """

    ILogger = Logger
    IProgressMonitor = IProgressMonitor
    TensorIOMode = TensorIOMode
    MemoryPoolType = MemoryPoolType
    PreviewFeature = PreviewFeature
    BuilderFlag = BuilderFlag
    NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, cuda: FakeCuda, version: str = "10.3.0") -> None:
        self.cuda = cuda
        self.__version__ = version
        self.__spec__ = ModuleSpec("tensorrt", None)  # torch asks for it
        self.last_config: FakeConfig | None = None
        self.network_flags = 0
        self.builds = 0
        self.parse_errors: list[SimpleNamespace] = []
        self.build_errors: list[str] = []
        self.step_errors: list[str] = []
        self.libraries: list[str] = []
        self.creators: list[tuple[str, str, str]] = []
        self.refuse_capture = False
        self.steps: list[tuple[int, dict[str, tuple[int, ...]]]] = []
        self.interrupt_build = False
        self.lower: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model

    def nptype(self, dtype: int) -> Any:
        return TYPES[dtype]

    def Builder(self, logger: Logger) -> FakeBuilder:
        return FakeBuilder(self, logger)

    def OnnxParser(self, network: FakeNetwork, logger: Logger) -> FakeParser:
        return FakeParser(self, network)

    def Runtime(self, logger: Logger) -> FakeRuntime:
        return FakeRuntime(self, logger)

    def get_plugin_registry(self) -> FakeRegistry:
        return FakeRegistry(self)


class ComputeCapability(enum.Enum):
    SM86 = 86
    SM89 = 89


class FakeTensorRtRtx(FakeTensorRt):
    """The module ``tensorrt_rtx``: it builds for named chips and keeps the kernels that it compiles."""

    ComputeCapability = ComputeCapability

    def __init__(self, cuda: FakeCuda, version: str = "1.7.1.116") -> None:
        super().__init__(cuda, version)
        self.kernel_caches: list[FakeKernels] = []


class FakeKernels:
    """What was compiled, as text that grows."""

    def __init__(self) -> None:
        self.text = b""
        self.taken: bytes | None = None

    def deserialize(self, blob: bytes) -> bool:
        self.taken = self.text = blob
        return True

    def serialize(self) -> bytes:
        return self.text + b"kernel;"


class FakeRuntimeConfig:
    def __init__(self, module: FakeTensorRtRtx) -> None:
        self.module = module
        self.strategy: ExecutionContextAllocationStrategy | None = None
        self.kernels: FakeKernels | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeKernels:
        self.module.kernel_caches.append(FakeKernels())
        return self.module.kernel_caches[-1]

    def set_runtime_cache(self, kernels: FakeKernels) -> bool:
        self.kernels = kernels
        return True


class FakeRegistry:
    def __init__(self, module: FakeTensorRt) -> None:
        self.module = module

    def load_library(self, path: str) -> str | None:
        if Path(path).read_bytes()[:4] != b"\x7fELF":
            return None
        self.module.libraries.append(path)
        return path

    def deregister_library(self, handle: str) -> None:
        self.module.libraries.remove(handle)

    @property
    def all_creators(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(name=name, plugin_version=version, plugin_namespace=space)
            for name, version, space in self.module.creators
        ]

    def get_creator(self, name: str, version: str, space: str) -> SimpleNamespace | None:
        key = (name, version, space)
        return next(
            (c for c, k in zip(self.all_creators, self.module.creators, strict=True) if k == key), None
        )


class FakeNetwork:
    def __init__(self) -> None:
        self.model = onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> SimpleNamespace:
        value = self.model.graph.input[index]
        return SimpleNamespace(name=value.name, shape=shape_of(value), is_shape_tensor=False)


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)


class FakeParser:
    def __init__(self, module: FakeTensorRt, network: FakeNetwork) -> None:
        self.module = module
        self.network = network

    @property
    def num_errors(self) -> int:
        return len(self.module.parse_errors)

    def get_error(self, index: int) -> SimpleNamespace:
        return self.module.parse_errors[index]

    def parse(self, data: bytes, path: str) -> bool:
        self.network.model = onnx.load_model_from_string(data)
        load_external_data_for_model(self.network.model, str(Path(path).parent))
        self.network.model = self.module.lower(self.network.model)
        return not self.module.parse_errors


class FakeProfile(dict[str, tuple[Any, Any, Any]]):
    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        self[name] = (low, opt, high)


class FakeConfig:
    def __init__(self) -> None:
        self.profiles: list[FakeProfile] = []
        self.pools: dict[MemoryPoolType, int] = {}
        self.features: dict[PreviewFeature, bool] = {}
        self.flags: set[BuilderFlag] = set()
        self.progress_monitor: Any = None
        self.num_compute_capabilities = 0
        self.capabilities: dict[int, ComputeCapability] = {}
        self.timings = b""

    def add_optimization_profile(self, profile: FakeProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: MemoryPoolType, nbytes: int) -> None:
        self.pools[pool] = nbytes

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        self.features[feature] = enable

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def set_compute_capability(self, capability: ComputeCapability, index: int) -> bool:
        assert index < self.num_compute_capabilities
        self.capabilities[index] = capability
        return True

    def create_timing_cache(self, data: bytes) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: data + b"measured;")

    def set_timing_cache(self, cache: SimpleNamespace, ignore_mismatch: bool) -> bool:
        self.timings = cache.serialize()
        return True

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: self.timings)


class FakeBuilder:
    def __init__(self, module: FakeTensorRt, logger: Logger) -> None:
        self.module = module
        self.logger = logger

    def create_network(self, flags: int) -> FakeNetwork:
        self.module.network_flags = flags
        return FakeNetwork()

    def create_builder_config(self) -> FakeConfig:
        self.module.last_config = FakeConfig()
        return self.module.last_config

    def create_optimization_profile(self) -> FakeProfile:
        return FakeProfile()

    def build_serialized_network(self, network: FakeNetwork, config: FakeConfig) -> bytes | None:
        self.module.builds += 1
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Tactics", "Building", 1)
        if self.module.interrupt_build and not monitor.step_complete("Tactics", 0):
            return None
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building")
        for line in self.module.build_errors:
            self.logger.log(Severities.ERROR, line)
        if self.module.build_errors:
            return None
        header = {
            "version": self.module.__version__,
            "profiles": config.profiles,
            "streamed": BuilderFlag.WEIGHT_STREAMING in config.flags,
        }
        model: bytes = network.model.SerializeToString()
        return json.dumps(header).encode() + b"\n" + model


class FakeRuntime:
    def __init__(self, module: FakeTensorRt, logger: Logger) -> None:
        self.module = module
        self.logger = logger

    def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
        head, _, model = bytes(plan).partition(b"\n")
        try:
            header = json.loads(head)
        except ValueError:
            self.logger.log(Severities.ERROR, "Error Code 1: Serialization (magicTag does not match)")
            return None
        if header["version"] != self.module.__version__:
            self.logger.log(
                Severities.ERROR,
                "The engine plan file is not compatible with this version of TensorRT, expecting library "
                f"version {self.module.__version__} got {header['version']}, please rebuild.",
            )
            return None
        return FakeEngine(self.module, self.logger, header, model)


class FakeEngine:
    def __init__(self, module: FakeTensorRt, logger: Logger, header: dict[str, Any], model: bytes) -> None:
        self.module, self.logger = module, logger
        self.profiles = header["profiles"]
        graph = onnx.load_model_from_string(model).graph
        self.values = {value.name: value for value in (*graph.input, *graph.output)}
        self.inputs = [value.name for value in graph.input]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        # Its fusions of dequantized weights would quantize activations, which TensorRT does not.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.streamable_weights_size = sum(len(each.raw_data) for each in graph.initializer)
        self.weight_streaming_budget_v2 = self.streamable_weights_size if header["streamed"] else -1
        self.num_optimization_profiles = len(self.profiles)
        self.device_memory_size_v2 = 4096

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.values)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> int:
        return int(self.values[name].type.tensor_type.elem_type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self.values[name])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        fixed = self.get_tensor_shape(name)
        return [tuple(dims) for dims in self.profiles[profile].get(name, (fixed,) * 3)]

    def create_runtime_config(self) -> FakeRuntimeConfig:
        assert isinstance(self.module, FakeTensorRtRtx)
        return FakeRuntimeConfig(self.module)

    def create_execution_context(
        self, how: ExecutionContextAllocationStrategy | FakeRuntimeConfig
    ) -> FakeContext:
        if isinstance(how, FakeRuntimeConfig):
            assert how.kernels is not None
            how = how.strategy or ExecutionContextAllocationStrategy.STATIC
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile = 0
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.memory = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        for name in self.engine.inputs:
            low, _, high = self.engine.get_tensor_profile_shape(name, profile)
            if low == high:
                self.shapes[name] = low
        return True

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert nbytes >= self.engine.device_memory_size_v2
        self.memory = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        inside = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if inside:
            self.shapes[name] = shape
        else:
            self._log(f"setInputShape: {name} {shape} is outside of the profile")
        return inside

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.values

    def execute_async_v3(self, stream: int) -> bool:
        engine, module = self.engine, self.engine.module
        if module.step_errors:
            self._log(module.step_errors.pop(0))
            return False
        missing = set(engine.values) - set(self.addresses) | set(engine.inputs) - set(self.shapes)
        if missing or not self.memory:
            self._log(f"not bound: {missing}")
            return False
        if module.refuse_capture and module.cuda.streams[stream].capturing is not None:
            module.cuda.streams[stream].broken = True
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        module.steps.append((self.profile, shapes))
        module.cuda.enqueue(stream, lambda: self._compute(addresses, shapes))
        return True

    def _compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        engine, cuda = self.engine, self.engine.module.cuda
        feeds = {}
        for name in engine.inputs:
            dtype = np.dtype(TYPES[engine.get_tensor_dtype(name)])
            nbytes = int(np.prod(shapes[name])) * dtype.itemsize
            feeds[name] = cuda.view(addresses[name], nbytes).view(dtype).reshape(shapes[name]).copy()
        outputs = [value.name for value in engine.session.get_outputs()]
        for name, result in zip(outputs, engine.session.run(outputs, feeds), strict=True):
            raw = np.ascontiguousarray(result).view(np.uint8).reshape(-1)
            cuda.view(addresses[name], raw.nbytes)[:] = raw

    def _log(self, line: str) -> None:
        self.engine.logger.log(Severities.ERROR, line)

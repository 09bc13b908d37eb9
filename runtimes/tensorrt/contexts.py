"""The execution contexts of an engine: one for prefill and one for decode, in the same scratch memory.

They never run at the same time, so the larger of their needs is allocated once, and its size is known before.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpm_edge.runtimes.cuda_runtime import Cuda, Stream
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.tensorrt.api import Api
from cpm_edge.runtimes.tensorrt.build import DECODE, PREFILL

if TYPE_CHECKING:
    import tensorrt as trt


class Contexts:
    """Contexts by profile.

    Args:
        jit_cache: file for the kernels that TensorRT-RTX compiles at the first step; None without one.

    Attributes:
        workspace: bytes of the scratch memory.

    Raises:
        BackendError: no memory, or the engine refuses.
    """

    def __init__(
        self, api: Api, cuda: Cuda, stream: Stream, engine: trt.ICudaEngine, jit_cache: Path | None
    ) -> None:
        self._api = api
        self._jit_cache = jit_cache
        self._kernels: Any = None
        self.workspace = int(engine.device_memory_size_v2)
        self._memory = cuda.malloc(max(self.workspace, 1), "activations and workspace")
        try:
            create = self._rtx_creator(engine) if api.is_rtx else self._creator(engine)
            self._contexts: list[trt.IExecutionContext] = [
                self._context(create, profile, stream) for profile in (PREFILL, DECODE)
            ]
            stream.wait()
        except BaseException:
            self._memory.free()
            raise

    def __getitem__(self, profile: int) -> trt.IExecutionContext:
        return self._contexts[profile]

    def close(self) -> None:
        """Keep what was compiled, then give contexts and memory back."""
        self._save_kernels()
        self._contexts.clear()
        self._kernels = None
        self._memory.free()

    def _creator(self, engine: trt.ICudaEngine) -> Any:
        strategy = self._api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        return lambda: engine.create_execution_context(strategy)

    def _rtx_creator(self, engine: Any) -> Any:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self._api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._kernels = config.create_runtime_cache()
        if self._jit_cache is not None and self._jit_cache.is_file():
            # One from another driver or version is refused whole and then written anew.
            self._kernels.deserialize(self._jit_cache.read_bytes())
        config.set_runtime_cache(self._kernels)
        return lambda: engine.create_execution_context(config)

    def _context(self, create: Any, profile: int, stream: Stream) -> trt.IExecutionContext:
        self._api.log.clear()
        context: trt.IExecutionContext | None = create()
        if context is None or not context.set_optimization_profile_async(profile, stream.handle):
            raise BackendError(
                f"{self._api.name} {self._api.version} cannot make a context for profile {profile}"
                + self._api.log.text(),
                hint="Build the engine anew: cpm-run BUNDLE --build-only",
            )
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._memory.address, max(self.workspace, 1))
        else:  # the first releases of TensorRT 10 take the address alone
            first: Any = context
            first.device_memory = self._memory.address
        return context

    def _save_kernels(self) -> None:
        if self._kernels is None or self._jit_cache is None:
            return
        # Keeping them only saves time, so a folder that cannot be written is no error.
        with contextlib.suppress(OSError):
            self._jit_cache.parent.mkdir(parents=True, exist_ok=True)
            draft = self._jit_cache.with_suffix(".draft")
            draft.write_bytes(memoryview(self._kernels.serialize()))
            draft.replace(self._jit_cache)

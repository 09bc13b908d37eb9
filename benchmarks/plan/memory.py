"""Memory of a running session: weights as the engine keeps them, cache, workspace, and the process itself.

The constants were measured as the peak of a process (VmHWM) with two threads, on random weights in the shapes
of MiniCPM4-0.5B and 8B and of SmolLM2: openvino 2026.4.1 and onnxruntime 1.32 on x86-64 with AVX2. What of
their libraries is resident differs by 30 to 60 MB between installations: ``base`` is in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpm_edge.benchmarks.plan.cache import CacheBytes, place
from cpm_edge.benchmarks.plan.shape import EMBEDDING, HEAD, NORM, ModelShape
from cpm_edge.benchmarks.plan.storage import WeightBytes

MIB = 1 << 20
CHUNK = 512  # prompt tokens a step
SCORES = 256 * MIB  # the most that a step's scores may take


@dataclass(frozen=True)
class Engine:
    """How an engine keeps a model.

    Attributes:
        base: bytes of the process: interpreter, libraries, graphs.
        copies: memory for each byte of weights that are multiplied with; repacked ones are there twice.
        scores: float32 scores of a step that are alive at once, as a share of one tensor of them.
        source: where the numbers come from.
    """

    base: int
    copies: float
    scores: float
    source: str


_MEASURED = "measured on MiniCPM4-0.5B and 8B shapes"
_GPU = Engine(724 * MIB, 1.02, 0.0, "fit of MiniCPM4-0.5B and 8B of OpenVINO's published table for the 358H")
# Qwen3 0.6B, 1.7B, 4B and 8B with float16 heads and embeddings: 1931, 3302, 4911 and 8221 MB.
_TENSORRT = Engine(
    452 * MIB,
    1.14,
    0.0,
    "fit of 4 published GPU memories of TensorRT-Edge-LLM, taken to hold 4096 tokens; ours was not measured",
)
_CPU = {
    "ort": Engine(97 * MIB, 1.386, 0.5, _MEASURED),
    "aipc stock": Engine(212 * MIB, 2.19, 1.0, _MEASURED),
    "aipc native": Engine(132 * MIB, 1.0, 0.0, _MEASURED),
    "jetson": _TENSORRT,
    "rtx": _TENSORRT,
}


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that a session of the planned context takes, and how sure that is."""

    weights: int
    cache: int
    workspace: int
    base: int
    source: str

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace + self.base


def device_memory(
    shape: ModelShape, weights: WeightBytes, cache: CacheBytes, target: str, flavour: str, device: str
) -> DeviceMemory:
    """Peak memory of one session whose cache is full.

    The embedding is not counted where it is a tensor of its own: only the rows of tokens are read.
    """
    where = place(target, flavour)
    engine = _GPU if target == "aipc" and device != "CPU" else _CPU[where]
    resident = sum(size for kind, size in weights.file.items() if kind not in (EMBEDDING, NORM))
    if HEAD not in weights.file:
        resident += weights.file[EMBEDDING]
    rows = min(CHUNK, cache.capacity)
    inner = shape.intermediate_size * (1 if shape.family != "moe" else 2)
    activations = 4 * rows * (3 * inner + 2 * shape.hidden_size)
    scores = int(engine.scores * min(SCORES, 4 * shape.heads * rows * cache.capacity))
    return DeviceMemory(
        weights=int(resident * engine.copies),
        cache=cache.total,
        workspace=activations + scores + 4 * shape.vocab_size,
        base=engine.base,
        source=engine.source,
    )


@dataclass(frozen=True)
class ExportCost:
    """What an export takes on the host, in bytes.

    Attributes:
        memory: peak of all its processes without verification: a constant, since weights stream through it.
        verified: with it: the bundle runs beside the model's layers.
        disk: the bundle.
        checkpoint: the source in bfloat16.
    """

    memory: int
    verified: int
    disk: int
    checkpoint: int


# Sums over the processes of exports of the 0.5B shape: 571 MB for ort, 580 for jetson, 884 and 880 for aipc's
# flavours, whose tokenizer is converted in a process of its own; with verification 1593, 1952 and 1616.
EXPORTING, CONVERTING, VERIFYING = 580_000_000, 300_000_000, 260_000_000


def export_cost(shape: ModelShape, weights: WeightBytes, session: DeviceMemory, target: str) -> ExportCost:
    """What does not grow with the model is measured; verifying adds a session and the largest float32 part.

    Args:
        session: of the few tokens that a verification takes.
    """
    others = 6 * MIB + 200 * shape.vocab_size  # graph, tokenizer, model card
    layer = max(m.values // m.count for m in shape.matrices) * 4
    memory = EXPORTING + (CONVERTING if target == "aipc" else 0)
    return ExportCost(
        memory=memory,
        verified=max(memory, EXPORTING + VERIFYING + session.total + layer),
        disk=weights.total + others,
        checkpoint=2 * shape.parameters,
    )

"""The published models that can be exported: what --list-models and the README show. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

# What computed the logits that seeded tiny checkpoints of an architecture were compared with, by
# ``Architecture.name`` in the registry.
REFERENCES = {
    "llama": "numpy, transformers",
    "minicpm": "numpy, transformers",
    "minicpm3": "numpy, transformers",
    "minicpm_moe": "numpy, transformers",
    "minicpm_sala": "numpy",
}
LEGEND = {
    "tiny": "seeded tiny checkpoints of the architecture: logits on every target against these references; "
    "for jetson and rtx those of the graph on ONNX Runtime, since no such device was at hand",
    "shape": "the published config at full size: read, parameters counted, traced without weights",
    "partly inferred": "some values of that config are not published; a sibling's stand for them",
    "real weights": "the published weights, exported and run",
}


@dataclass(frozen=True)
class Release:
    """Published models of one shape.

    Attributes:
        names: as on the model hub, the first in full.
        family: ``Architecture.name`` in the registry.
        features: what sets the model apart, as its config and its template say.
        config: file name of the published config.json among the tests' data, without ending.
        native: ``--flavour native`` covers it too.
        inferred: some values of that config are not published and are those of a sibling.
        real_weights: the published weights themselves were run.
    """

    names: str
    family: str
    features: tuple[str, ...]
    config: str
    native: bool = True
    inferred: bool = False
    real_weights: bool = False

    @property
    def targets(self) -> str:
        """What a bundle can be made for."""
        found = "ort, aipc, aipc native" if self.native else "ort, aipc"
        # The kernels of a Jetson have no latent attention.
        return f"{found}, {'jetson stock' if self.family == 'minicpm3' else 'jetson'}, rtx"

    @property
    def tested(self) -> str:
        """How the model was tested: see LEGEND."""
        shape = "shape, partly inferred" if self.inferred else "shape"
        real = "; real weights" if self.real_weights else ""
        return f"tiny: {REFERENCES[self.family]}; {shape}{real}"


RELEASES = (
    Release("MiniCPM5-1B", "llama", ("thinking", "tools"), "minicpm5-1b"),
    Release("MiniCPM5-2B", "llama", ("thinking", "tools"), "minicpm5-2b"),
    Release(
        "MiniCPM4.1-8B, AgentCPM-Report",
        "minicpm",
        ("muP", "LongRoPE", "InfLLM-V2", "thinking"),
        "minicpm4.1-8b",
        inferred=True,
    ),
    Release("MiniCPM4-8B, -Survey, -MCP", "minicpm", ("muP", "LongRoPE", "InfLLM-V2"), "minicpm4-8b"),
    Release("MiniCPM4-0.5B", "minicpm", ("muP", "tied", "LongRoPE"), "minicpm4-0.5b", inferred=True),
    Release("BitCPM-CANN-8B", "minicpm", ("ternary", "muP", "LongRoPE"), "minicpm4-8b"),
    Release("BitCPM-CANN-3B", "llama", ("ternary", "LongRoPE"), "bitcpm-cann-3b", inferred=True),
    Release("BitCPM-CANN-1B", "llama", ("ternary", "LongRoPE"), "bitcpm-cann-1b", inferred=True),
    Release(
        "BitCPM4-0.5B, BitCPM-CANN-0.5B",
        "minicpm",
        ("ternary", "muP", "tied", "LongRoPE"),
        "minicpm4-0.5b",
        inferred=True,
    ),
    Release("BitCPM4-1B", "minicpm", ("ternary", "muP", "tied", "LongRoPE"), "bitcpm4-1b", inferred=True),
    Release("MiniCPM-SALA", "minicpm_sala", ("muP", "InfLLM-V2", "linear attention"), "minicpm-sala"),
    Release("MiniCPM-MoE-8x2B", "minicpm_moe", ("muP", "tied", "experts"), "minicpm-moe-8x2b"),
    Release("MiniCPM3-4B", "minicpm3", ("muP", "tied", "LongRoPE", "latent attention"), "minicpm3-4b"),
    Release("MiniCPM-2B-sft, -dpo", "minicpm", ("muP", "tied"), "minicpm-2b"),
    Release("MiniCPM-2B-128k", "minicpm", ("muP", "dynamic NTK"), "minicpm-2b-128k"),
    Release("MiniCPM-2B-sft, -dpo in llama-format", "llama", (), "minicpm-2b-llama-format"),
    Release("MiniCPM-1B-sft", "minicpm", ("muP", "tied"), "minicpm-1b"),
    Release("MiniCPM-S-1B-sft", "minicpm", ("muP", "tied", "FATReLU"), "minicpm-s-1b"),
    Release("SmolLM2-135M-Instruct", "llama", ("tied",), "smollm2-135m", real_weights=True),
)

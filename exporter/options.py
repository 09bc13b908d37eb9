"""What an export was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

TARGETS = ("ort", "aipc", "jetson", "rtx")
# Targets whose graph becomes a TensorRT engine on the device.
ENGINES = ("jetson", "rtx")
WEIGHT_FORMATS = ("auto", "fp32", "fp16", "bf16", "int8", "int4", "ternary")
HEAD_FORMATS = ("fp32", "fp16", "bf16", "int8")
ATTENTION = ("auto", "dense", "sparse")
KV_CACHE = ("fp32", "fp16", "int8")
ACTIVATIONS = ("fp32", "int8")
DEVICES = ("CPU", "GPU", "NPU")  # of a chip, for --plan
FLAVOURS = ("stock", "native")
_DEFAULT_FLAVOURS = {"jetson": "native"}
METHODS = ("rtn", "awq", "gptq", "gptq+awq")
CALIBRATION_TOKENS = 8192


@dataclass(frozen=True)
class ExportOptions:
    """The options of ``cpm-export``, by the same names; None is the default described in ``--help``."""

    model: str
    target: str
    output: Path
    weight_format: str = "auto"
    group_size: int | None = None
    symmetric: bool = True
    embedding_format: str | None = None
    head_format: str | None = None
    method: str = "rtn"
    dataset: Path | None = None
    calibration_tokens: int = CALIBRATION_TOKENS
    skip_positions: int | None = None
    act_order: bool = True
    damping: float | None = None
    ratio: float = 1.0
    save_checkpoint: Path | None = None
    attention: str = "auto"
    kv_cache: str | None = None
    activations: str | None = None
    flavour: str | None = None
    chip: str | None = None
    max_context: int | None = None
    revision: str | None = None
    verify: bool = True
    verify_tokens: int = 64
    overwrite: bool = False

    @property
    def resolved_flavour(self) -> str:
        """The flavour asked for, or the target's usual one."""
        return self.flavour or _DEFAULT_FLAVOURS.get(self.target, "stock")

    @property
    def needs_calibration(self) -> bool:
        """Whether int4 layers are more than rounded to nearest."""
        return self.method != "rtn" or self.ratio < 1 or self.save_checkpoint is not None

    def after_calibration(self) -> ExportOptions:
        """The options of an export from the calibrated checkpoint, whose integers are taken as they are."""
        return replace(
            self,
            weight_format="auto",
            group_size=None,
            symmetric=True,
            method="rtn",
            dataset=None,
            ratio=1.0,
            save_checkpoint=None,
        )

"""Calibrations of the tiny checkpoints, each made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter import eager
from cpm_edge.exporter.calibration.matrices import LayerFile
from cpm_edge.exporter.calibration.run import Calibrated, calibrate
from cpm_edge.exporter.checkpoint import Checkpoint, open_checkpoint
from cpm_edge.exporter.export import Plan, prepare
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from tests.support.checkpoints import config_of, stored_of, write_checkpoint

TOKENS = 512


@dataclass(frozen=True)
class Outcome:
    """A calibration with what it was made from."""

    plan: Plan
    source: Checkpoint
    result: Calibrated

    def layers(self) -> list[LayerFile]:
        return [LayerFile(path) for path in sorted(self.result.folder.glob("layer-*.safetensors"))]

    def logits(self, read: Any, ids: list[int]) -> Any:
        """Of the torch modules on weights that ``read`` gives."""
        rope = self.plan.config.rope.table(self.plan.max_context)

        def weight(name: str) -> Any:
            return np.asarray(rope.inv_freq) if name == "rotary.inv_freq" else read(name)

        model = self.plan.architecture.model_class()
        return eager.run_streamed(model, self.plan.config, rope, weight, ids).logits


class Bench:
    """Makes tiny checkpoints and calibrates them."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        self._stack = stack
        self.checkpoint = cache(self._checkpoint)
        self.outcome = cache(self._outcome)

    def options(self, variant: str, **changes: Any) -> ExportOptions:
        usual: dict[str, Any] = {
            "weight_format": "int4",
            "group_size": 32,
            "method": "gptq",
            "calibration_tokens": TOKENS,
            "verify": False,
            "output": self.root / "out",
        }
        return ExportOptions(
            model=str(self.checkpoint(variant)),
            target="ort",
            **(usual | changes),
        )

    def _checkpoint(self, variant: str) -> Path:
        return write_checkpoint(self.root / "checkpoints" / variant, config_of(variant), stored_of(variant))

    def _outcome(self, variant: str, **changes: Any) -> Outcome:
        name = "-".join([variant, *(f"{key}={value}" for key, value in changes.items())]).replace("/", "_")
        return self.calibrate(self.root / "work" / name, variant, **changes)

    def calibrate(self, folder: Path, variant: str, **changes: Any) -> Outcome:
        """A calibration into a folder of the caller's."""
        options = self.options(variant, **changes)
        source = self._stack.enter_context(open_checkpoint(options.model))
        plan = prepare(options, source)
        return Outcome(plan, source, calibrate(plan, folder, Progress(enabled=False)))


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path_factory.mktemp("calibration"), stack)

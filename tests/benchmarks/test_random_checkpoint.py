from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.random_checkpoint import write_checkpoint
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.quant.floats import to_bf16_bits
from tests.benchmarks.shapes import write_shape


def test_ternary_layers_are_a_scale_times_three_values(tmp_path: Path) -> None:
    write_checkpoint(Shape.open(str(write_shape(tmp_path))), tmp_path / "model", ternary=True)
    with open_checkpoint(str(tmp_path / "model")) as checkpoint:
        for name in checkpoint.tensors:
            values = checkpoint.read(name)
            if values.ndim == 1 or "embed" in name:
                continue
            groups = values.reshape(len(values), -1, 128)
            scales = np.abs(groups).max(-1, keepdims=True)
            codes = groups / scales
            assert set(np.unique(codes)) == {-1.0, 0.0, 1.0}, name
            bits = to_bf16_bits(scales.reshape(1, -1)).astype(np.uint32) << 16
            np.testing.assert_array_equal(bits.view(np.float32), scales.reshape(1, -1))
            assert len(np.unique(scales)) > scales.size // 4, "a scale of its own for most groups"
        embedding = checkpoint.read("model.embed_tokens.weight")
        assert len(np.unique(np.abs(embedding))) > 100


def test_columns_that_128_does_not_divide_are_refused(tmp_path: Path) -> None:
    shape = Shape.open(str(write_shape(tmp_path, intermediate_size=192)))
    with pytest.raises(BenchError, match="multiple of 128 columns, the shape has 192"):
        write_checkpoint(shape, tmp_path / "model", ternary=True)

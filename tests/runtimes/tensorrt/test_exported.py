"""Exported bundles: engines of their graphs are built for real, and sessions run them on stand-ins."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpm_edge.exporter.graph_session import portable
from cpm_edge.runtimes import load
from cpm_edge.runtimes.session import FloatArray, Session
from tests.exporter.targets.conftest import FORMS, engines  # noqa: F401 - a fixture
from tests.runtimes.tensorrt.conftest import Board, put_in_place
from tests.runtimes.tensorrt.fake_cuda import FakeCuda
from tests.runtimes.tensorrt.fake_tensorrt import FakeTensorRtRtx
from tests.source_tree import ROOT
from tests.support.bundles import Bundles

MODELS = {"llama": "int4", "sparse": "int4", "sala": "int8"}
PLUGINS = ("CpmMatMulNBits", "CpmSparseAttention", "CpmLinearAttention")
# Of the exporter's own check of these graphs (tests/exporter/targets/test_engine_graphs.py).
TOLERANCE = 0.06


def with_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """Plugin nodes as functions of standard operators, which ONNX Runtime can run."""
    return ir.to_proto(portable(ir.from_proto(model)))


@pytest.fixture(params=FORMS)
def device(request: pytest.FixtureRequest, board: Board, monkeypatch: pytest.MonkeyPatch) -> str:
    """An Orin with plugins, or a PC with an RTX card; which flavour it runs."""
    if request.param == "native":
        board.tensorrt.creators = [(name, "1", "cpm") for name in PLUGINS]
        board.tensorrt.lower = with_bodies
    else:
        cuda = FakeCuda(sm=89, integrated=False)
        put_in_place(monkeypatch, cuda, tensorrt_rtx=FakeTensorRtRtx(cuda))
    return str(request.param)


def mixed(session: Session, tokens: list[int]) -> FloatArray:
    """Logits of every token: chunks, single tokens, a detour that is taken back, the rest in a fork."""
    rows = [session.forward(tokens[:90], "all")]
    rows += [session.forward([token])[None] for token in tokens[90:97]]
    session.forward(tokens[:40])
    session.rewind(40)
    with session.fork() as twin:
        rows.append(twin.forward(tokens[97:150], "all"))
        rows += [twin.forward([token])[None] for token in tokens[150:155]]
    return np.concatenate(rows)


@pytest.mark.parametrize("variant", MODELS)
def test_sessions_give_the_logits_of_the_modules(
    variant: str,
    device: str,
    engines: Bundles,  # noqa: F811
) -> None:
    options: dict[str, Any] = {"weight_format": MODELS[variant], **FORMS[device]}
    expected = engines.stored(variant, **options)[:155]
    with load(engines.open(variant, **options).path) as model, model.session() as session:
        assert model.info()["cuda_graph"] is True
        error = np.abs(mixed(session, engines.prompt[:155].tolist()) - expected).max(1)
    # Which blocks sparse rows read may turn with rounding; rows below dense_len choose nothing.
    assert error[:63].max() < TOLERANCE and np.median(error) < TOLERANCE / 3
    assert (error > TOLERANCE).mean() < (0.15 if variant == "sparse" else 1e-9)


def test_plugin_free_graphs_become_engines_for_two_chips(engines: Bundles) -> None:  # noqa: F811
    paths = [
        engines.open(variant, weight_format=weights, **FORMS["stock"]).path
        for variant, weights in MODELS.items()
    ]
    command = [sys.executable, "-m", "tests.runtimes.tensorrt.rtx_bundles", *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    for path, nbytes in zip(paths, sizes, strict=True):
        assert isinstance(nbytes, int), nbytes
        assert nbytes > (path / "model.onnx.data").stat().st_size

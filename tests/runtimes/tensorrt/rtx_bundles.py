"""Engines of bundles with the real TensorRT-RTX, for two chips: ``python -m
tests.runtimes.tensorrt.rtx_bundles BUNDLE...`` prints their sizes, or what was refused, as JSON.
"""

from __future__ import annotations

import json
import sys

from cpm_edge.runtimes.bundle import open_bundle
from cpm_edge.runtimes.errors import CpmEdgeError
from cpm_edge.runtimes.tensorrt.api import load_api
from cpm_edge.runtimes.tensorrt.build import BuildSpec, build_engine
from cpm_edge.runtimes.tensorrt.memory import Need


def main(paths: list[str]) -> None:
    json.dump([built(path) for path in paths], sys.stdout)


def built(path: str) -> int | str:
    """Bytes of the engine, or the message of the error."""
    bundle = open_bundle(path)
    engine = bundle.manifest.engine
    spec = BuildSpec(
        bundle.file("model.onnx"),
        engine["prefill_chunk"],
        bundle.manifest.vocab_size,
        Need.of(engine).workspace,
        sms=(86, 89),
    )
    try:
        return memoryview(build_engine(load_api(engine["name"]), spec).plan).nbytes
    except CpmEdgeError as error:
        return error.message


if __name__ == "__main__":
    main(sys.argv[1:])

"""A profile of a machine that no profile describes: measured once, then kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from cpm_edge.benchmarks.plan.chip import SCHEMA, Chip, parse_chip
from cpm_edge.benchmarks.plan.detect import Signs, with_memory
from cpm_edge.benchmarks.plan.errors import PlanError

THIS_MACHINE = "this-machine"  # the id of its profile
METHOD = 2  # of measuring; a profile of another one is measured again
BLOCK = 64 << 20  # bytes a thread; more than caches hold
READ_SECONDS = 1.5  # of passes, of which the middle one counts: what a run of minutes will find, too
PRODUCT_SECONDS = 0.5  # of which the best counts
# What decode reads of the bandwidth that a plain read reaches.
REACHED = 0.85
SIDE = 1024
# What the native flavour takes a layer beside reading, and its int8 products against float32 ones of numpy,
# from MiniCPM4-0.5B and SmolLM2, int4, on two Zen 3 cores: 45 to 61 and 130 to 137 tok/s at 19 to 22 GB/s;
# 270 prompt tok/s (0.5B).
LAYER_SECONDS = 0.9e-4
INT8_TO_FLOAT = 1.9


def cache_file(signs: Signs) -> Path:
    """Where the profile of this processor is kept; CPM_EDGE_CACHE names another folder."""
    name = hashlib.sha256(f"{METHOD} {signs.processor} {os.cpu_count()} {signs.memory}".encode()).hexdigest()[
        :12
    ]
    return _folder() / f"this-machine-{name}.json"


def _folder() -> Path:
    given = os.environ.get("CPM_EDGE_CACHE")
    if given:
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "cpm-edge"
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "cpm-edge"


def this_machine(signs: Signs, *, measure: Callable[[], tuple[float, float]] | None = None) -> Chip:
    """The kept profile, or a new one; its memory is what is free now.

    Args:
        measure: (bytes a second read, float32 operations a second); about two seconds by default.
    """
    file = cache_file(signs)
    try:
        chip = parse_chip(json.loads(file.read_text(encoding="utf-8")), file.name)
    except (OSError, ValueError, PlanError):
        content = _profile(signs, *(measure or _measured)())
        chip = parse_chip(content, "this-machine")
        with contextlib.suppress(OSError):  # a cache that cannot be kept is measured again
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)
    return with_memory(chip, signs)


def _profile(signs: Signs, bandwidth: float, operations: float) -> dict[str, object]:
    cores = os.cpu_count() or 1
    measured = f"measured here once with numpy, {cores} threads"
    native = "seconds a layer: native int4 on two Zen 3 cores"
    return {
        "schema": SCHEMA,
        "id": THIS_MACHINE,
        "name": signs.processor or "this machine",
        "kind": "cpu",
        "sm": None,
        "memory": {"value": signs.memory, "source": "this system's total"} if signs.memory else None,
        "reserved": {"value": 0.25, "source": "chosen: a desktop with a browser"},
        "bandwidth": {"value": float(f"{bandwidth:.3g}"), "source": measured},
        "power_modes": None,
        "detect": {},
        "devices": {
            "CPU": {
                "name": f"{cores} cores",
                "fp16": None,
                "int8": None,
                "roofline": {
                    "bandwidth": float(f"{REACHED * bandwidth:.3g}"),
                    "layer": LAYER_SECONDS,
                    "spread": 0.2,
                    "source": f"{REACHED:.0%} of the bandwidth {measured}; {native}",
                },
                "prefill": {
                    "rate": float(f"{operations * INT8_TO_FLOAT:.3g}"),
                    "layer": 0.0,
                    "spread": 0.4,
                    "source": f"float32 products {measured}, times {INT8_TO_FLOAT} for int8 ones",
                },
            }
        },
    }


def _measured() -> tuple[float, float]:
    """Bytes a second read by all cores, and float32 operations a second."""
    threads = os.cpu_count() or 1
    blocks = [np.ones(BLOCK, np.int8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        read = median(_passes(lambda: list(pool.map(np.maximum.reduce, blocks)), READ_SECONDS))
    square = np.ones((SIDE, SIDE), np.float32)
    return threads * BLOCK / read, 2 * SIDE**3 / min(_passes(lambda: square @ square, PRODUCT_SECONDS))


def _passes(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each pass, of as many as there is time for."""
    found, begun = [], time.perf_counter()
    while (start := time.perf_counter()) < begun + seconds:
        work()
        found.append(time.perf_counter() - start)
    return found

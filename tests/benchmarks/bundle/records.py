"""A record like those that a run writes."""

from __future__ import annotations

import copy
from typing import Any

RECORD: dict[str, Any] = {
    "schema": 1,
    "benchmark": "run",
    "command": ["run", "MiniCPM4-8B-int4", "-o", "report.html"],
    "time": "2026-01-01T00:00:00+00:00",
    "machine": {"cpu": "Some CPU", "cores": 8, "memory_bytes": 32_000_000_000},
    "versions": {"openvino": "2026.4.1", "torch": None},
    "settings": {"contexts": [32, 1024], "new_tokens": 4, "repeat": 2, "threads": 8, "device": "GPU"},
    "notes": ["energy: not measured, this system exposes no counter that can be read"],
    "results": {
        "bundle": {
            "name": "MiniCPM4-8B-int4",
            "target": "aipc",
            "flavour": "stock",
            "weights": "int4 g32 sym",
            "files": {"openvino_model.bin": 4_870_000_000},
            "card": "# <MiniCPM4>",
        },
        "chip": {"id": "core-ultra-7-358h", "name": "Core Ultra X7 358H"},
        "engine": {"engine": "openvino"},
        "load_seconds": 3.5,
        "roofline": {"bandwidth": 153.6e9, "source": "LPDDR5X-9600"},
        "memory": {
            "peak": 5_100_000_000,
            "loaded": 1,
            "mapped_files": 4_400_000_000,
            "anonymous": 600_000_000,
            "cache": 40_000_000,
            "predicted": {"weights": 4.6e9, "cache": 4e7, "workspace": 1e8, "base": 7e8, "total": 5.44e9},
        },
        "conditions": {
            "others": 0.01,
            "celsius": [50.0, 61.0],
            "hertz": [None, None],
            "governor": None,
            "joules": None,
            "energy_source": None,
        },
        "accuracy": None,
        "contexts": [
            {
                "context": 32,
                "first_token_seconds": [0.05, 0.06],
                "step_seconds": [[0.04, 0.041, 0.04], [0.042, 0.04, 0.05]],
                "output_hashes": ["aa"],
                "read_bytes": 4.4e9,
                "predicted": {"low": 22.0, "high": 28.0},
                "predicted_first_token": {"low": 0.04, "high": 0.08},
            },
            {
                "context": 1024,
                "first_token_seconds": [0.3, 0.31],
                "step_seconds": [[0.041, 0.042, 0.041], [0.042, 0.043, 0.042]],
                "output_hashes": ["bb"],
                "read_bytes": 4.5e9,
                "predicted": {"low": 21.5, "high": 27.5},
            },
        ],
    },
}


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The record with one value replaced."""
    content = copy.deepcopy(RECORD)
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content

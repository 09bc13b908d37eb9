"""The plugin library in a real registry, through the runtime's own code: ``python -m
tests.runtimes.tensorrt.plugin_process LIBRARY OTHER`` prints a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.tensorrt.api import Api, PluginLibrary, load_api

NAMES = ["CpmLinearAttention", "CpmMatMulNBits", "CpmSparseAttention"]


def main(path: Path, other: Path) -> None:
    api = load_api("tensorrt_rtx")
    found = {"before": creators(api)}
    library = PluginLibrary.load(api, path, NAMES, "1")
    again = PluginLibrary.load(api, path, NAMES, "1")
    found["loaded"] = creators(api)
    found["second library"] = refusal(api, other, "1")
    again.release()
    found["one user left"] = creators(api)
    library.release()
    found["released"] = creators(api)
    found["other version"] = refusal(api, path, "2")
    found["after a refusal"] = creators(api)
    found["not a library"] = refusal(api, Path(__file__), "1")
    print(json.dumps(found), flush=True)
    # TensorRT crashes at exit where there is no driver.
    os._exit(0)


def creators(api: Api) -> list[str]:
    every = api.module.get_plugin_registry().all_creators
    return sorted(each.name for each in every if each.plugin_namespace == "cpm")


def refusal(api: Api, path: Path, version: str) -> list[str]:
    try:
        PluginLibrary.load(api, path, NAMES, version)
    except BackendError as error:
        return [error.message]
    return []


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

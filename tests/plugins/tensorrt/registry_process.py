"""TensorRT's plugin registry with a plugin library: nodes as JSON on stdin, what was found on stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import tensorrt_lean_bindings as trt


def main() -> None:
    registry = trt.get_plugin_registry()
    handle = registry.load_library(sys.argv[1])
    assert handle
    creators = {
        each.name: [each.plugin_version, each.plugin_namespace, [field.name for field in each.field_names]]
        for each in registry.all_creators
        if each.name.startswith("Cpm")
    }
    found = {"creators": creators, "plugins": [_create(registry, node) for node in json.load(sys.stdin)]}
    print(json.dumps(found), flush=True)
    # TensorRT crashes at exit where there is no driver.
    os._exit(0)


def _create(registry: Any, node: dict[str, Any]) -> list[Any] | None:
    fields, kept = [], []
    for name, value in node["fields"].items():
        text = isinstance(value, str)
        data = np.frombuffer(value.encode(), np.int8) if text else np.array([value], np.int32)
        kept.append(data)
        kind = trt.PluginFieldType.CHAR if text else trt.PluginFieldType.INT32
        fields.append(trt.PluginField(name, data, kind))
    creator = registry.get_creator(node["op"], node["version"], node["namespace"])
    plugin = creator.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    if plugin is None:
        return None
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    return [core.plugin_name, core.plugin_version, core.plugin_namespace, build.num_outputs]


if __name__ == "__main__":
    main()

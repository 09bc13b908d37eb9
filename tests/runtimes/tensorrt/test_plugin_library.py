"""Loading the real plugins into a real registry; TensorRT-RTX has one, though its parser takes no plugins."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from cpm_edge.plugins.tensorrt_library import library
from tests.runtimes.tensorrt.plugin_process import NAMES
from tests.source_tree import ROOT


def test_plugins_come_and_go_with_their_users(tmp_path: Path) -> None:
    path = library(platform.machine())
    other = shutil.copy(path, tmp_path / "libcpm_tensorrt.so")
    command = [sys.executable, "-m", "tests.runtimes.tensorrt.plugin_process", str(path), str(other)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["before"] == found["released"] == found["after a refusal"] == []
    assert found["loaded"] == found["one user left"] == NAMES
    assert "runs a bundle with plugins already" in found["second library"][0]
    assert "CpmMatMulNBits version 1" in found["other version"][0].split("found")[1]
    assert "plugin_process.py does not load in tensorrt_rtx" in found["not a library"][0]
    assert "invalid ELF header" in found["not a library"][0]

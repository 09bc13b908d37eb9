"""Make tensorrt-stubs usable for mypy: ``python .ci/tensorrt_typings.py FOLDER`` (mypy_path in setup.cfg).

The wheel has no ``py.typed``, and two kinds of generated signatures are no Python: a parameter named ``in``,
and one without a default behind one with.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import files
from pathlib import Path

PACKAGES = ("tensorrt", "tensorrt_bindings")


def repaired(text: str) -> str:
    """The same stub as valid Python."""
    text = re.sub(r"\bin: (?=list\[)", "inputs: ", text)
    return re.sub(r"(def add_scale_nd\(.*), channel_axis: int\)", r"\1, channel_axis: int = ...)", text)


def main(folder: Path) -> None:
    for file in files("tensorrt-stubs") or ():
        if file.parts[0] in PACKAGES and file.suffix == ".pyi":
            text = repaired(file.read_text(encoding="utf-8"))
            ast.parse(text, filename=str(file))
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

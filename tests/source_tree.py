"""The files of the distribution and what each of them imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "exporter", "plugins", "quant", "runtimes")

_MODULE_NAME = re.compile(rf"cpm_edge\.({'|'.join(PACKAGES)})(\.\w+)*\.?")


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        module: dotted name.
        line: where it stands.
        lazy: within a function, so that it runs only when called.
    """

    module: str
    line: int
    lazy: bool

    @property
    def top(self) -> str:
        """``numpy`` of ``numpy.typing``; ``cpm_edge.quant`` of ``cpm_edge.quant.int4``."""
        parts = self.module.split(".")
        return ".".join(parts[:2]) if parts[0] == "cpm_edge" else parts[0]


def source_files(package: str) -> list[Path]:
    """Python files of a top-level folder."""
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[Import]:
    """Everything a file imports at run time; what stands under TYPE_CHECKING is left out.

    A string that names a module of this project counts as a lazy import: it is given to import_module.
    """
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), lazy=False))


def _walk(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for branch in node.orelse:
            yield from _walk(branch, lazy=lazy)
        return
    yield from _named(node, lazy=lazy)
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, lazy=lazy)


def _named(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, lazy)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        yield Import(module, node.lineno, lazy)
        # ``from cpm_edge import quant`` names a package only in the second half.
        for alias in node.names:
            if _MODULE_NAME.fullmatch(f"{module}.{alias.name}"):
                yield Import(f"{module}.{alias.name}", node.lineno, lazy)
    elif isinstance(node, ast.Constant) and _MODULE_NAME.fullmatch(str(node.value)):
        yield Import(str(node.value).rstrip("."), node.lineno, lazy=True)

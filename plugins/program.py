"""A decode step as a program of the native library: its ops in order, with nothing between them.

Activations are places in one array of floats, each an offset; ``Values`` gives them out.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.linear_attention.recurrent import CRecurrentRows
from cpm_edge.plugins.matmul_nbits.native import c_shape
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.mixture_of_experts.native import CExperts
from cpm_edge.plugins.native import check, library, pointer
from cpm_edge.plugins.session import NativeSession
from cpm_edge.plugins.sparse_attention.native import CAttentionSpec
from cpm_edge.plugins.sparse_attention.native_latent import CLatentRows, CLatentSpec
from cpm_edge.plugins.sparse_mlp.native import CSparseMlpWeights

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
ABSENT, RESULT = -1, -2  # no value; the result of the program
_LINE = 16  # floats of a cache line, at which every value begins


class Values:
    """Gives out places for activations; what was given back is given out again."""

    def __init__(self) -> None:
        self.size = 0
        self._free: dict[int, list[int]] = {}

    def take(self, floats: int) -> int:
        """The offset of so many floats."""
        free = self._free.get(_whole_lines(floats))
        return free.pop() if free else self.fresh(floats)

    def fresh(self, floats: int) -> int:
        """An offset that no value had before: for what is written before the first op runs."""
        offset = self.size
        self.size += _whole_lines(floats)
        return offset

    def give_back(self, offset: int, floats: int) -> None:
        """Let a later value of this size have the place."""
        self._free.setdefault(_whole_lines(floats), []).append(offset)

    def array(self) -> Floats:
        """Zeros for all of them, at the beginning of a cache line."""
        memory = np.zeros(self.size + _LINE, np.float32)
        first = -(memory.ctypes.data // 4) % _LINE
        return memory[first : first + self.size]


def _whole_lines(floats: int) -> int:
    return -(-floats // _LINE) * _LINE


@dataclass(frozen=True)
class Norm:
    """The row that an op normalizes first: factor * rms_norm(value at x) * weight (n,)."""

    x: int
    weight: Floats
    epsilon: float
    factor: float = 1.0


class _CNorm(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


def _c_norm(norm: Norm) -> _CNorm:
    return _CNorm(norm.x, norm.weight.size, pointer(norm.weight, np.float32), norm.epsilon, norm.factor)


class Program:
    """The ops of one step. Arguments named x, y and so on are offsets; weights are kept alive.

    Sessions may share a program, each with an array of its own.
    """

    def __init__(self) -> None:
        create = library().cpm_program_create
        create.restype = ctypes.c_void_p
        self._address = ctypes.c_void_p(create())
        destroy = library().cpm_program_destroy
        destroy.restype = None
        weakref.finalize(self, destroy, self._address)
        self._run = library().cpm_program_run
        pointers = [ctypes.c_void_p] * 2
        self._run.argtypes = [*pointers, ctypes.c_int64, *pointers]
        self._kept: list[Any] = []

    def norm_linear(self, norm: Norm, shape: NBitsShape, panels: Bytes, y: int) -> None:
        """y = n . w^T with the normalized row n."""
        arguments = (ctypes.byref(_c_norm(norm)), ctypes.byref(c_shape(shape)))
        self._add("norm_linear", *arguments, self._bytes(panels), y, keep=norm)

    def linear_add(
        self, x: int, residual: int, scale: float, shape: NBitsShape, panels: Bytes, y: int
    ) -> None:
        """y = residual + scale * (x . w^T)"""
        described = ctypes.byref(c_shape(shape))
        self._add("linear_add", x, residual, ctypes.c_float(scale), described, self._bytes(panels), y)

    def norm_gated(self, norm: Norm, shape: NBitsShape, gate: Bytes, up: Bytes, y: int) -> None:
        """y = silu(n . gate^T) * (n . up^T)"""
        arguments = (ctypes.byref(_c_norm(norm)), ctypes.byref(c_shape(shape)))
        self._add("norm_gated", *arguments, self._bytes(gate), self._bytes(up), y, keep=norm)

    def norm_experts(self, norm: Norm, experts: CExperts, scale: float, y: int, *, keep: Any) -> None:
        """y = x + scale * what the experts make of n; ``keep``: the arrays behind the struct's addresses."""
        described = (ctypes.byref(_c_norm(norm)), ctypes.byref(experts))
        self._add("norm_experts", *described, ctypes.c_float(scale), y, keep=(norm, keep))

    def norm_sparse_mlp(
        self, norm: Norm, weights: CSparseMlpWeights, residual: int, scale: float, y: int, *, keep: Any
    ) -> None:
        """y = residual + scale * the MLP of n"""
        described = (ctypes.byref(_c_norm(norm)), ctypes.byref(weights))
        self._add("norm_sparse_mlp", *described, residual, ctypes.c_float(scale), y, keep=(norm, keep))

    def gather(self, x: int, columns: npt.NDArray[np.int32], y: int) -> None:
        """y = x at these columns"""
        self._add("gather", x, pointer(columns, np.int32), columns.size, y, keep=columns)

    def attention(
        self, layer: int, spec: CAttentionSpec, qkv: int, rotation: tuple[int, int], y: int, *, gated: bool
    ) -> None:
        """Attention on the session's cache of a layer; rotation: cosines and sines, or twice ABSENT."""
        index, gate = ctypes.c_int32(layer), ctypes.c_int32(gated)
        self._add("attention", index, ctypes.byref(spec), gate, qkv, *rotation, y)

    def recurrent(
        self,
        layer: int,
        constants: CRecurrentRows,
        mixed: int,
        rotation: tuple[int, int],
        y: int,
        *,
        keep: Any,
    ) -> None:
        """A recurrent layer between its products, on the session's state."""
        self._add("recurrent", ctypes.c_int32(layer), ctypes.byref(constants), mixed, *rotation, y, keep=keep)

    def latent(
        self,
        layer: int,
        spec: CLatentSpec,
        constants: CLatentRows,
        rows: tuple[int, int],
        rotation: tuple[int, int],
        y: int,
        *,
        keep: Any,
    ) -> None:
        """Latent attention on the session's cache; rows: query and latent."""
        described = (ctypes.c_int32(layer), ctypes.byref(spec), ctypes.byref(constants))
        self._add("latent", *described, *rows, *rotation, y, keep=keep)

    def run(self, session: NativeSession, past_length: int, values: Floats, result: Floats) -> None:
        """Compute the token at ``past_length``; ``result`` receives the value that is called RESULT.

        A close of the session from another thread waits for the end.

        Raises:
            NativeError: a cache or state that is missing or full, or the session is closed.
        """
        with session.in_use() as address:
            status = self._run(self._address, address, past_length, values.ctypes.data, result.ctypes.data)
        check(status, f"token {past_length}")

    def _bytes(self, weights: Bytes) -> ctypes.c_void_p | None:
        self._kept.append(weights)
        return pointer(weights, np.uint8)

    def _add(self, op: str, *arguments: Any, keep: Any = None) -> None:
        self._kept.append(keep)
        function = getattr(library(), f"cpm_program_{op}")
        function.restype = None
        function(self._address, *(ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments))

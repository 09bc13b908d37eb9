"""What an engine's inputs and outputs are for, read from their names and shapes."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpm_edge.runtimes.cache_layout import STATE
from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.tensorrt.api import Api
from cpm_edge.runtimes.tensorrt.build import DECODE, PREFILL, ROWS_INPUT, TOKEN_INPUTS, dimensions

if TYPE_CHECKING:
    import tensorrt as trt

PAST_LENGTH = "past_length"
LOGITS = "logits"
_PAST, _PRESENT, _NEW = "past_key_values.", "present.", "new."
FORMS = ("in_place", "rows_out")


class Kind(enum.Enum):
    """How a cache gets its new contents."""

    IN_PLACE = "in place"  # the output is bound to the input's address
    ROWS = "rows"  # the output has the new rows, copied behind the old ones
    STATE = "state"  # the output replaces the input


@dataclass(frozen=True)
class CachePort:
    """A cache: the input that is read and the output that is written.

    Attributes:
        name: "3.key", "3.value", "3.pooled" or "3.recurrent_state".
        shape: of the input, static: (1, kv heads, capacity, head_dim) or (1, heads, D, D).
    """

    name: str
    output: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: Kind

    @property
    def input(self) -> str:
        return _PAST + self.name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] * self.dtype.itemsize

    @property
    def is_state(self) -> bool:
        return self.name.endswith(STATE)


@dataclass(frozen=True)
class EngineIo:
    """All inputs and outputs.

    Attributes:
        tokens: name of the input that has the tokens: their embeddings or their ids.
        width: columns of it, hidden_size or None.
        caches: in the order of the engine; weights: inputs that hold weights.
        chunk, logit_rows: most tokens and most rows of logits of a prefill step.
        vocab_size: columns of the logits.
    """

    tokens: str
    width: int | None
    caches: tuple[CachePort, ...]
    weights: tuple[str, ...]
    chunk: int
    logit_rows: int
    vocab_size: int

    @classmethod
    def of(cls, api: Api, engine: trt.ICudaEngine, form: str) -> EngineIo:
        """Sort the names of an engine.

        Args:
            form: the manifest's ``cache.form``: "in_place" or "rows_out".

        Raises:
            BundleError: names, shapes or profiles that the runtime cannot serve.
        """
        if form not in FORMS:
            raise BundleError(f"cache.form: expected {' or '.join(FORMS)}, got {form!r}", hint=_UPGRADE)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = api.module.TensorIOMode.INPUT
        inputs = [name for name in names if engine.get_tensor_mode(name) == is_input]
        outputs = [name for name in names if name not in inputs]
        tokens = [name for name in inputs if name in TOKEN_INPUTS]
        _expect(len(tokens) == 1, f"one input {' or '.join(TOKEN_INPUTS)}", inputs)
        _expect({PAST_LENGTH, ROWS_INPUT} <= set(inputs), f"inputs {PAST_LENGTH} and {ROWS_INPUT}", inputs)
        _expect(LOGITS in outputs, f"an output {LOGITS}", outputs)
        _expect(engine.num_optimization_profiles == 2, "two profiles", engine.num_optimization_profiles)
        caches = [_cache(api, engine, name, outputs, form) for name in inputs if name.startswith(_PAST)]
        known = {*tokens, PAST_LENGTH, ROWS_INPUT, *(cache.input for cache in caches)}
        written = {LOGITS, *(cache.output for cache in caches)}
        _expect(set(outputs) == written, f"outputs {sorted(written)}", sorted(outputs))
        shape = dimensions(engine.get_tensor_shape(tokens[0]))
        return cls(
            tokens=tokens[0],
            width=shape[2] if len(shape) == 3 else None,
            caches=tuple(caches),
            weights=tuple(name for name in inputs if name not in known),
            chunk=_most(engine, tokens[0], 1),
            logit_rows=_most(engine, ROWS_INPUT, 0),
            vocab_size=engine.get_tensor_shape(LOGITS)[2],
        )

    @property
    def states(self) -> tuple[CachePort, ...]:
        """Those of recurrent layers, by layer."""
        return tuple(sorted((c for c in self.caches if c.is_state), key=lambda c: int(c.name.split(".")[0])))

    @property
    def capacity(self) -> int | None:
        """Rows of the caches of keys and values; None where every layer is recurrent."""
        return next((c.shape[2] for c in self.caches if c.name.endswith(".key")), None)


_UPGRADE = "Upgrade with: pip install --upgrade cpm-edge"


def _cache(api: Api, engine: trt.ICudaEngine, name: str, outputs: list[str], form: str) -> CachePort:
    short = name.removeprefix(_PAST)
    shape = dimensions(engine.get_tensor_shape(name))
    _expect(-1 not in shape and len(shape) == 4, f"a static 4-D shape of {name}", list(shape))
    dtype = np.dtype(api.numpy_type(engine.get_tensor_dtype(name)))
    out_of_place = Kind.STATE if short.endswith(STATE) else Kind.ROWS
    kind = Kind.IN_PLACE if form == "in_place" else out_of_place
    output = (_NEW if kind is Kind.ROWS else _PRESENT) + short
    _expect(output in outputs, f"an output {output} for {name}", outputs)
    written = dimensions(engine.get_tensor_shape(output))
    expected = (*shape[:2], -1, shape[3]) if kind is Kind.ROWS else shape
    _expect(written == expected, f"{output} of shape {list(expected)}", list(written))
    found = np.dtype(api.numpy_type(engine.get_tensor_dtype(output)))
    _expect(found == dtype, f"{output} of type {dtype}", found)
    if kind is Kind.IN_PLACE:
        # Newer releases tell which input an output shares its memory with; None is no answer.
        alias = getattr(engine, "get_aliased_input_tensor", lambda output: None)(output)
        _expect(alias in (None, "", name), f"{output} in the memory of {name}", alias)
    return CachePort(short, output, shape, dtype, kind)


def _most(engine: trt.ICudaEngine, name: str, axis: int) -> int:
    decode, prefill = (
        dimensions(engine.get_tensor_profile_shape(name, profile)[2]) for profile in (DECODE, PREFILL)
    )
    _expect(decode[axis] == 1, f"one of {name} in the decode profile", list(decode))
    return prefill[axis]


def _expect(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise BundleError(
            f"the engine: expected {what}, got {got}",
            hint="Export the bundle again and build its engine anew.",
        )

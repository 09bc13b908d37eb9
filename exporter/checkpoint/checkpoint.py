"""An opened checkpoint: config, tensors read on demand, tokenizer files, identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cpm_edge.exporter.checkpoint.files import fingerprint_file
from cpm_edge.exporter.checkpoint.integers import Integers
from cpm_edge.exporter.checkpoint.tensors import FloatRows, RawRows, TensorInfo, TensorStore, row_range
from cpm_edge.exporter.errors import CheckpointError

Assets = dict[str, bytes | Path]


class Checkpoint:
    """A checkpoint opened for reading; made by ``open_checkpoint``, usable as a context manager.

    Attributes:
        name: what to call it: folder name, hub id, or stem of the GGUF file.
        kind: ``safetensors``, ``torch`` or ``gguf``.
        config: config.json as parsed; for GGUF the same keys, taken from its metadata.
        generation_config: generation_config.json, ``{}`` when there is none.
        tensors: Hugging Face tensor names to shape and type; no weight is read for it.
        calibrated: its integers are those of our own calibration; matrices without are to stay int8.
    """

    def __init__(
        self,
        *,
        name: str,
        kind: str,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        store: TensorStore,
        load_assets: Callable[[], Assets],
        identity: list[Path],
        calibrated: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.config = config
        self.generation_config = generation_config
        self._store = store
        self._load_assets = load_assets
        self._identity = identity
        self.calibrated = calibrated

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._store.tensors

    @property
    def packed(self) -> Mapping[str, str]:
        """The format (``GPTQ``, ``AWQ``, ``Q4_0`` ...) of each tensor that is stored in integers."""
        return self._store.packed

    def integers(self, name: str) -> Integers | None:
        """The integers of a tensor as they are stored; None if it is not packed or has no equal in a bundle.

        Raises:
            CheckpointError: unknown tensor, or its scales, zero points or group indices are damaged.
        """
        self._info(name)
        return self._store.integers(name) if name in self.packed else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatRows:
        """Rows ``[start, stop)`` along axis 0 as a new C-contiguous float32 array, dequantized if packed.

        Raises:
            CheckpointError: unknown tensor, rows outside it, or a read error.
        """
        first, last = row_range(self._info(name), start, stop)
        return self._store.read(name, first, last)

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> RawRows:
        """The same rows in the storage type (float16, bfloat16, int32, ...), for lossless copies.

        Raises:
            CheckpointError: as ``read``, and for packed tensors.
        """
        first, last = row_range(self._info(name), start, stop)
        return self._store.read_raw(name, first, last)

    def assets(self) -> Assets:
        """Tokenizer and template files by their Hugging Face names, as a path or as new content.

        Always holds ``tokenizer.json`` and ``tokenizer_config.json``; others only when there are any.

        Raises:
            CheckpointError: there is no tokenizer, or it cannot be converted; says why.
        """
        return self._load_assets()

    def fingerprint(self) -> dict[str, Any]:
        """``{"name", "kind", "files": {file name: {"bytes", "sha256_head"}}}``: which checkpoint this is.

        Big files are identified by their size and both ends (see ``fingerprint_file``), so the value
        notices a different checkpoint, not a single flipped bit.
        """
        paths = [*self._identity, *self._store.files]
        try:
            files = {path.name: fingerprint_file(path) for path in paths}
        except OSError as error:
            raise CheckpointError(f"{self.name}: cannot be read again: {error}") from error
        return {"name": self.name, "kind": self.kind, "files": files}

    def with_calibration(self, store: TensorStore) -> Checkpoint:
        """The same checkpoint with calibrated weights: config, tokenizer and identity are this one's."""
        return Checkpoint(
            name=self.name,
            kind=self.kind,
            config=self.config,
            generation_config=self.generation_config,
            store=store,
            load_assets=self._load_assets,
            identity=[*self._identity, *self._store.files],
            calibrated=True,
        )

    def close(self) -> None:
        """Close the weight files; a second call does nothing."""
        self._store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self._store.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.name} has no tensor {name}; it has {len(self.tensors)} others")
        return info

"""Calibration layer by layer: one decoder layer in memory, everything finished on disk.

The text's hidden states go through every layer once as the checkpoint has it, for the second moments of its
inputs, and once as it was quantized: what comes out is what the next layer will meet. A layer is finished
when its result and the hidden states behind it are in files; a run that was killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpm_edge.exporter.calibration.activations import Activations
from cpm_edge.exporter.calibration.dataset import Sequences
from cpm_edge.exporter.calibration.gather import gather
from cpm_edge.exporter.calibration.layer import LayerCalibration
from cpm_edge.exporter.calibration.matrices import LayerFile
from cpm_edge.exporter.calibration.settings import Settings
from cpm_edge.exporter.calibration.sites import layer_sites
from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.configs.rope import RopeTable
from cpm_edge.exporter.eager import build_model, empty_cache, load_weights
from cpm_edge.quant import Scheme

STATE = "calibration.json"
VERSION = 3  # of what is done: results of another one are not gone on from


@dataclass(frozen=True)
class CalibrationJob:
    """A model and a text.

    Attributes:
        scheme_of: the int4 scheme of a linear layer, by tensor name.
        folder: for intermediate results; made when missing, gone on from when they are of the same job.
        progress: called with the number of weights done, each counted three times a layer.
    """

    checkpoint: Checkpoint
    model_class: type[Any]
    config: LlamaConfig
    rope: RopeTable
    sequences: Sequences
    settings: Settings
    scheme_of: Callable[[str], Scheme]
    folder: Path
    progress: Callable[[int], None]

    def fingerprint(self) -> dict[str, Any]:
        """What the intermediate results depend on."""
        settings = {key: value for key, value in self.settings.to_json().items() if key != "ratio"}
        return {
            "version": VERSION,
            "source": self.checkpoint.fingerprint(),
            "config": repr(self.config),
            "rope": hashlib.sha256(np.asarray(self.rope.inv_freq).tobytes()).hexdigest(),
            "settings": settings,
            "sequences": list(self.sequences.ids.shape),
            "ids": hashlib.sha256(self.sequences.ids.tobytes()).hexdigest(),
            "scheme": self.scheme_of("").describe(),
        }


def threads() -> dict[str, int]:
    """What sums are divided by: the variable that sets a library's number of threads, and the number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    openmp = os.environ.get("OMP_NUM_THREADS", "")
    blas = os.environ.get("OPENBLAS_NUM_THREADS") or openmp
    return {
        "OMP_NUM_THREADS": torch.get_num_threads(),
        "OPENBLAS_NUM_THREADS": int(blas) if blas.isdecimal() else cores,
    }


def _read_state(path: Path) -> dict[str, Any]:
    """What an earlier run left; empty where it is missing, damaged or of another version."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


PASSES = 3  # weights are counted for the first pass, the quantization and the second pass


class Calibrator:
    """Runs a job.

    Args:
        job: what to do.

    Attributes:
        resumed: layers that an earlier run had finished.
        threads: that run's, else this one's (see ``threads``).
        discarded: layers that a run with other options had left in the folder.
    """

    def __init__(self, job: CalibrationJob) -> None:
        self._job = job
        self._model = build_model(job.model_class, job.config, job.rope)
        self._layers = job.config.num_hidden_layers
        self.threads = threads()
        self.discarded = 0
        self._open_folder()
        self.resumed = self._finished()

    @torch.no_grad()
    def run(self) -> list[LayerFile]:
        """The results of all layers.

        Raises:
            CheckpointError: a matrix that cannot be quantized.
            QuantError: activations that are not finite.
        """
        rotation = self._embed()
        for index in range(self._layers):
            if index < self.resumed:
                self._job.progress(PASSES * self._weights(index))
            else:
                self._layer(index, rotation)
        return [LayerFile(self._result(index)) for index in range(self._layers)]

    def _open_folder(self) -> None:
        """Leave the folder with this job's results, or none."""
        folder, fingerprint = self._job.folder, self._job.fingerprint()
        state = folder / STATE
        earlier = _read_state(state)
        if earlier.get("job") == fingerprint:
            self.threads = earlier["threads"]
            return
        if folder.exists():
            self.discarded = len(list(folder.glob("layer-*.safetensors")))
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        unfinished = state.with_suffix(".partial")
        about = {"job": fingerprint, "threads": self.threads}
        unfinished.write_text(json.dumps(about, sort_keys=True, indent=1), encoding="utf-8")
        unfinished.replace(state)

    def _finished(self) -> int:
        """Layers whose results are there, with the hidden states that the next one needs."""
        done = 0
        while done < self._layers and self._result(done).is_file():
            done += 1
        if done < self._layers and not self._hidden(done).path.is_file():
            return 0
        return done

    def _result(self, index: int) -> Path:
        return self._job.folder / f"layer-{index:05}.safetensors"

    def _hidden(self, index: int) -> Activations:
        """The hidden states in front of a layer."""
        ids = self._job.sequences.ids
        shape = (ids.shape[0], ids.shape[1], self._job.config.hidden_size)
        return Activations(self._job.folder / f"hidden-{index:05}.f32", shape)

    def _embed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotation of a sequence; the hidden states in front of the first layer are written."""
        model, tied = self._model, self._job.config.tie_word_embeddings
        past = torch.zeros(1, dtype=torch.int64)
        load_weights(model.rotary, "rotary.", self._read, tied)
        load_weights(model.model.embed_tokens, "model.embed_tokens.", self._read, tied)
        ids = torch.from_numpy(self._job.sequences.ids)
        _, cos, sin = model.embed(ids[:1], past)
        if self.resumed == 0:
            embedded = (model.embed(row[None], past)[0].numpy() for row in ids)
            self._hidden(0).write(embedded)
        model.model.embed_tokens.to_empty(device="meta")
        return cos, sin

    def _layer(self, index: int, rotation: tuple[torch.Tensor, torch.Tensor]) -> None:
        job, prefix = self._job, f"model.layers.{index}."
        layer = self._model.model.layers[index]
        load_weights(layer, prefix, self._read, job.config.tie_word_embeddings)
        sites = layer_sites(layer)

        def first_pass() -> None:
            for _ in self._through(layer, index, rotation):
                pass

        moments = gather(layer, sites, job.settings.skipped, first_pass)
        work = LayerCalibration(layer, prefix, job.settings, job.scheme_of, job.progress)
        result = work.run(sites, moments)
        del moments
        if index + 1 < self._layers:
            self._hidden(index + 1).write(self._through(layer, index, rotation))
        else:
            job.progress(self._weights(index))
        result.save(self._result(index))
        layer.to_empty(device="meta")
        self._hidden(index).path.unlink()

    def _through(
        self, layer: Any, index: int, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The hidden states behind a layer, batch by batch."""
        hidden = self._hidden(index)
        count, length, _ = hidden.shape
        share = self._weights(index) / count
        done = 0
        for batch in hidden.batches():
            size = len(batch)
            turn = (rotation[0].expand(size, -1, -1), rotation[1].expand(size, -1, -1))
            past = torch.zeros(size, dtype=torch.int64)
            cache = empty_cache(self._job.config, index, length, size)
            output, _ = layer(torch.from_numpy(batch), turn, past, cache)
            self._job.progress(int(share * (done + size)) - int(share * done))
            done += size
            yield output.numpy()

    def _weights(self, index: int) -> int:
        """Weights of a layer's linear layers."""
        layer = self._model.model.layers[index]
        parts = (part for site in layer_sites(layer) for part in site.parts)
        return sum(layer.get_parameter(f"{name}.weight").numel() for part in parts for name in part.readers)

    def _read(self, name: str) -> npt.NDArray[np.float32]:
        if name == "rotary.inv_freq":
            return np.asarray(self._job.rope.inv_freq)
        return self._job.checkpoint.read(name)

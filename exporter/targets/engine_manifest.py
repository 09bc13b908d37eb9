"""What the manifest says of an engine: its memory, its prompt steps and its caches."""

from __future__ import annotations

from typing import Any

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.targets.common import BuildJob, cache_layers
from cpm_edge.exporter.targets.engine_graph import DATA, cached_bytes, capacity_of
from cpm_edge.exporter.targets.engine_options import find_chip
from cpm_edge.runtimes.cuda_runtime import size
from cpm_edge.runtimes.tensorrt.memory import Need

NAME = "tensorrt"
VERSION = "10.3"  # JetPack 6's, to which the graph keeps
REQUIRES = ">=10.3"
LONGEST_CHUNK, SHORTEST_CHUNK = 512, 16
SCORES_BUDGET = 256 << 20  # bytes for all that is as large as the scores
LOGITS_BUDGET = 48 << 20  # the runtime asks for 32 MiB of float32 logits at most; they come from float16
# Bytes a score of the written-out attention: float16 and float32 scores, float16 weights; the choice of
# blocks adds a mask.
_SCORE_BYTES, _SPARSE_SCORE_BYTES = 8, 10


def longest_chunk(job: BuildJob) -> int:
    """The largest power of two that a cache has room for, 512 at most."""
    return int(min(LONGEST_CHUNK, 1 << (capacity_of(job).bit_length() - 1)))


def stock_chunk(job: BuildJob) -> int:
    """Tokens of one step of a prompt: the largest power of two whose scores fit the budget."""
    spec = job.config.attention_spec(0)
    each = _SCORE_BYTES if spec.is_dense else _SPARSE_SCORE_BYTES
    chunk = longest_chunk(job)
    while (
        chunk > SHORTEST_CHUNK and each * spec.num_heads * chunk * (capacity_of(job) + chunk) > SCORES_BUDGET
    ):
        chunk //= 2
    return chunk


def stock_workspace(job: BuildJob, chunk: int) -> int:
    """Bytes of temporaries of a whole chunk: scores, the widest activations, logits."""
    spec = job.config.attention_spec(0)
    each = _SCORE_BYTES if spec.is_dense else _SPARSE_SCORE_BYTES
    return each * spec.num_heads * chunk * (capacity_of(job) + chunk) + activation_bytes(job, chunk)


def activation_bytes(job: BuildJob, chunk: int) -> int:
    """Bytes of what is widest in a chunk: the residual, and the MLP's two inner tensors or the logits."""
    config = job.config
    logits = min(6 * chunk * config.vocab_size, LOGITS_BUDGET)
    return 4 * chunk * config.hidden_size + max(4 * chunk * config.intermediate_size, logits)


def memory_of(job: BuildJob, workspace: int, pooled_stride: int = 0) -> dict[str, int]:
    """``weights``, ``kv_cache`` and ``workspace`` in bytes.

    Args:
        pooled_stride: keys a cached pooled key, 0 for none.

    Raises:
        ExportError: the chip asked for does not have that much.
    """
    memory = {
        "weights": (job.folder / DATA).stat().st_size,
        "kv_cache": cached_bytes(job, pooled_stride),
        "workspace": workspace,
    }
    if job.chip is not None:
        profile = find_chip(job.chip, job.target)
        usable, need = profile.usable_bytes, Need.of({"memory": memory})
        if usable is not None and need.total > usable:
            raise ExportError(
                f"{profile.name}: expected at most {size(usable)} (what its system leaves of "
                f"{size(profile.memory_bytes or 0)}), got {need}",
                hint="a smaller --max-context, or --weight-format int4",
            )
    return memory


def cache_of(job: BuildJob, form: str, pooled_stride: int = 0) -> dict[str, Any]:
    """The manifest's ``cache``."""
    return {
        "form": form,
        **cache_layers(job.config, "float16"),
        "capacity": capacity_of(job),
        "multiple_of": job.config.attention_spec(0).block_size,
        "pooled_stride": pooled_stride,
    }


def engine_of(
    sm: int | None,
    chunk: int,
    table: dict[str, Any] | None,
    memory: dict[str, int],
    plugins: dict[str, Any] | None,
) -> dict[str, Any]:
    """The manifest's ``engine``."""
    return {
        "name": NAME,
        "version": VERSION,
        "requires": REQUIRES,
        "sm": sm,
        "prefill_chunk": chunk,
        "plugins": plugins,
        "embedding": table,
        "memory": memory,
    }

"""What a session holds in memory at the longest context, measured in a process that does nothing else."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.table import Table

from cpm_edge.benchmarks.context.decode import fill
from cpm_edge.benchmarks.context.synthetic import Synthetic
from cpm_edge.benchmarks.memory import resident_bytes, resident_of_file, return_freed_memory
from cpm_edge.benchmarks.peers.peer import FIRST_TOKEN
from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.bundle import open_bundle
from cpm_edge.runtimes.cache_layout import RecurrentLayout
from cpm_edge.runtimes.openvino.native_session import PREFILL_CHUNK, OpenVinoNativeSession
from cpm_edge.runtimes.stats import peak_rss

NEW_TOKENS = 4
WEIGHTS = "openvino_native.bin"


def measure_footprint(bundle: Path, context: int, threads: int) -> dict[str, int]:
    """Run ``footprint`` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(footprint, bundle, context, threads).result()


def footprint(path: Path, context: int, threads: int) -> dict[str, int]:
    """Bytes at ``context`` tokens, the last of which came by a prefill chunk and a few decode steps.

    Returns:
        resident: the sum of weights (mapped from the bundle), keys_and_values and pooled_keys (the cache),
        states (of recurrent layers, with snapshots), scratch (what the first steps added) and rest (Python,
        libraries, compiled graphs). Beside it: peak (VmHWM), and given_back: smaller caches, freed as the
        cache grew, that the C library keeps for later and gave back when it was asked to. All 0 where the
        system does not tell.
    """
    bundle = open_bundle(path)
    cache = bundle.manifest.cache
    engine = open_engine(bundle, threads=threads, max_context=context)
    chunk = max(1, min(PREFILL_CHUNK, context // 2))
    steps = min(NEW_TOKENS, context - chunk)
    with engine.session() as session:
        assert isinstance(session, OpenVinoNativeSession)
        # Rows repeat after a while: the draw itself must not show in the peak.
        synthetic = Synthetic(
            cache["kv_heads"], PREFILL_CHUNK, cache["head_dim"], recurrent=RecurrentLayout.of(cache)
        )
        fill(session, context - chunk - steps, synthetic)
        grown = sum(resident_bytes().values())
        return_freed_memory()
        before = sum(resident_bytes().values())
        session.forward([FIRST_TOKEN] * chunk)
        for _ in range(steps):
            session.forward([FIRST_TOKEN])
        resident, weights = sum(resident_bytes().values()), resident_of_file(WEIGHTS)
        # Pages of the cache that no row has reached yet are not in memory.
        reached = session.position / session.capacity
        pooled = int(session.pooled_bytes() * reached)
        states = session.state_bytes() + session.snapshot_bytes()
        rows = int((session.cache_bytes() - states) * reached) - pooled
    appended = (rows + pooled) * (chunk + steps) // context
    scratch = max(0, resident - weights - before - appended)
    return {
        "weights": weights,
        "keys_and_values": rows,
        "pooled_keys": pooled,
        "states": states,
        "scratch": scratch,
        "rest": resident - weights - rows - pooled - states - scratch,
        "resident": resident,
        "given_back": max(0, grown - before),
        "peak": peak_rss() or 0,
    }


def footprint_table(found: dict[str, int], context: int) -> Table:
    table = Table("memory", "MB", title=f"memory of a process with one session at {context} tokens")
    names = {
        "weights": "weights, mapped from the bundle",
        "keys_and_values": "keys and values, float16",
        "pooled_keys": "pooled keys, float32",
        "states": "states of recurrent layers and their snapshots, float32",
        "scratch": "scratch of prefill and decode steps",
        "rest": "Python, libraries, compiled graphs",
        "resident": "resident, sum of the above",
        "peak": "peak (VmHWM)",
        # Last, since it is no part of the sum; without the request to return it, it would stay.
        "given_back": "not in the sum: freed as the cache grew, returned before the last chunk",
    }
    for key, name in names.items():
        if key == "states" and not found[key]:
            continue
        table.add_row(name, f"{found[key] / 1e6:.0f}")
    return table

"""Measures one bundle in a process of its own: load, first tokens, every decode step, memory.

A repeat at a context of n tokens is a fresh session: n random tokens (seeded, so that runs can be compared)
are prefilled, the first token is taken from their logits, and the following ones are decoded greedily, one
step each. Time to first token is that of the prefill; decode speed leaves the first token out. One repeat
before all others is thrown away. Contexts take turns within each round. Rounds go on for a while: machines
are slow for seconds at a time, and a spread that does not cover that says nothing about the next run.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.benchmarks.bundle.conditions import Conditions, watched
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.memory import resident_bytes
from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.bundle import open_bundle
from cpm_edge.runtimes.session import Engine
from cpm_edge.runtimes.stats import peak_rss

SEED = 7
FIRST_ID = 3  # ids below are special in most vocabularies
WARM_UP = 32
FEWEST, MOST = 5, 100  # rounds, where seconds decide


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        contexts: tokens of the prompts.
        new_tokens: of which the first belongs to the prefill.
        repeat: rounds; None is as many as ``seconds`` have room for, FEWEST to MOST.
    """

    contexts: tuple[int, ...]
    new_tokens: int
    threads: int | None
    device: str
    repeat: int | None
    seconds: float

    @property
    def length(self) -> str:
        """Of a measurement, in words."""
        return f"about {self.seconds:g} s" if self.repeat is None else f"{self.repeat} rounds"

    def is_enough(self, rounds: int, seconds: float) -> bool:
        """After so many rounds that took so long."""
        if self.repeat is not None:
            return rounds >= self.repeat
        return rounds >= FEWEST and (seconds >= self.seconds or rounds >= MOST)


def measure(path: Path, settings: Settings) -> dict[str, Any]:
    """Run ``measure_here`` in a process of its own.

    Raises:
        BenchError: a context that the bundle does not take, or a process that was killed.
        BackendError: the engine is not installed or cannot use the device.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            return child.submit(measure_here, path, settings).result()
    except BrokenProcessPool as error:
        raise BenchError(
            f"{path}: the process that ran it was killed, probably for memory",
            hint="a shorter --context, or cpm-export --plan, which tells what a bundle takes",
        ) from error


def measure_here(path: Path, settings: Settings) -> dict[str, Any]:
    """Every raw number of one bundle, JSON-ready, times in seconds and memory in bytes."""
    bundle = open_bundle(path)
    longest = max(settings.contexts) + settings.new_tokens
    if longest > bundle.manifest.context.max_context:
        raise BenchError(
            f"--context: expected at most {bundle.manifest.context.max_context - settings.new_tokens} beside "
            f"{settings.new_tokens} new tokens, got {max(settings.contexts)}",
            hint="the bundle was exported for a shorter context",
        )
    start = time.perf_counter()
    engine = open_engine(bundle, device=settings.device, threads=settings.threads, max_context=longest)
    load = time.perf_counter() - start
    loaded = resident_bytes()
    vocabulary = bundle.manifest.vocab_size
    repeat_once(engine, min(WARM_UP, max(settings.contexts)), settings.new_tokens, vocabulary)
    rows: list[list[dict[str, Any]]] = [[] for _ in settings.contexts]
    with watched() as conditions:
        begun = time.perf_counter()
        while not settings.is_enough(len(rows[0]), time.perf_counter() - begun):
            for context, row in zip(settings.contexts, rows, strict=True):
                row.append(repeat_once(engine, context, settings.new_tokens, vocabulary))
    return {
        "load_seconds": load,
        "contexts": [_joined(*pair) for pair in zip(settings.contexts, rows, strict=True)],
        "memory": _memory(loaded, max(r["cache_bytes"] for row in rows for r in row)),
        "engine": engine.info(),
        "conditions": asdict(conditions),
        "notes": _notes(conditions),
    }


def repeat_once(
    engine: Engine,
    context: int,
    new_tokens: int,
    vocab_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """One fresh session: seconds of the prefill and of every step after it, and the tokens."""
    prompt = random_prompt(context, vocab_size)
    steps: list[float] = []
    with engine.session() as session:
        start = clock()
        token = int(session.forward(prompt).argmax())
        first = clock() - start
        tokens = [token]
        for _ in range(new_tokens - 1):
            start = clock()
            token = int(session.forward([token]).argmax())
            steps.append(clock() - start)
            tokens.append(token)
        cache = session.cache_bytes()
    return {"first": first, "steps": steps, "tokens": tokens, "cache_bytes": cache}


def random_prompt(length: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """The same ids for the same length and vocabulary."""
    return np.random.default_rng(SEED).integers(FIRST_ID, vocab_size, length)


def output_hash(tokens: list[int]) -> str:
    """Twelve digits that tell whether two runs gave the same tokens."""
    return hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).hexdigest()[:12]


def _joined(context: int, repeats: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "context": context,
        "first_token_seconds": [repeat["first"] for repeat in repeats],
        "step_seconds": [repeat["steps"] for repeat in repeats],
        "output_hashes": sorted({output_hash(repeat["tokens"]) for repeat in repeats}),
        "cache_bytes": repeats[0]["cache_bytes"],
    }


def _memory(loaded: dict[str, int], cache: int) -> dict[str, int | None]:
    now = resident_bytes()
    return {
        "peak": peak_rss(),
        "loaded": sum(loaded.values()) or None,
        "mapped_files": now.get("mapped files"),
        "anonymous": now.get("anonymous"),
        "cache": cache,
    }


def _notes(conditions: Conditions) -> list[str]:
    notes = conditions.notes()
    if conditions.joules is None:
        notes.append("energy: not measured, this system exposes no counter that can be read")
    return notes

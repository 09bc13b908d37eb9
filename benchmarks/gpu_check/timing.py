"""Seconds of work on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def graph_seconds(run: Callable[[], object]) -> float:
    """Median of ``run`` as a CUDA graph, as engines launch it; the second-level cache holds nothing of it."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, and lets libraries allocate, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e-3 * float(do_bench(graph.replay, return_mode="median"))

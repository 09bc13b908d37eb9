"""Second moments of a layer's inputs, gathered while the layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from cpm_edge.exporter.calibration.sites import Site
from cpm_edge.exporter.models.minicpm_moe import Experts
from cpm_edge.exporter.ops.mixture_of_experts import route
from cpm_edge.quant.hessian import Hessian


def gather(
    layer: nn.Module, sites: Sequence[Site], skipped: int, run: Callable[[], None]
) -> dict[str, Hessian]:
    """The second moments of all parts, by their keys.

    Args:
        layer: with its weights.
        skipped: positions at the start of each sequence that are left out.
        run: feeds the calibration's activations, (B, T, hidden), through the layer.

    Raises:
        QuantError: activations that are not finite.
    """
    moments: dict[str, Hessian] = {}
    with ExitStack() as hooks:
        for part in (part for site in sites for part in site.parts):
            module = layer.get_submodule(part.readers[0])
            moments[part.key] = Hessian(module.in_features)  # type: ignore[arg-type]
            if part.expert is None:
                hook = partial(_add_input, moments[part.key], skipped)
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        mlp = layer.get_submodule("mlp")
        if isinstance(mlp, Experts):
            hooks.callback(mlp.register_forward_pre_hook(partial(_add_experts, moments, skipped)).remove)
        run()
    return moments


def _add_input(moment: Hessian, skipped: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    moment.add(inputs[0][:, skipped:].flatten(0, -2).numpy())


def _add_experts(
    moments: dict[str, Hessian], skipped: int, module: nn.Module, inputs: tuple[Any, ...]
) -> None:
    assert isinstance(module, Experts)
    for expert, rows, inner in _expert_inputs(module, inputs[0][:, skipped:].flatten(0, -2)):
        moments[f"mlp.experts.{expert}.in"].add(rows.numpy())
        moments[f"mlp.experts.{expert}.out"].add(inner.numpy())


@torch.no_grad()
def _expert_inputs(module: Experts, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What each expert and its last matrix read: the op itself calls no module for them."""
    chosen, _ = route(module.gate(rows), module.spec)
    for index, expert in enumerate(module.experts):
        mine = rows[(chosen == index).any(1)]
        inner = F.silu(F.linear(mine, expert.w1.weight)) * F.linear(mine, expert.w3.weight)  # type: ignore[union-attr,arg-type]
        yield index, mine, inner

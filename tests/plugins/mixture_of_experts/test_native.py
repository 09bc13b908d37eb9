"""The kernel against the op's definition on the weights that the panels hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cpm_edge.plugins.matmul_nbits import native, reference
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.mixture_of_experts.native import mixture_of_experts
from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec
from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas
from tests.plugins.matmul_nbits.test_native import Weight, storage
from tests.plugins.mixture_of_experts.cases import Case

Floats = npt.NDArray[np.float32]
SCHEMES = [(4, 32, True), (4, 32, False), (2, 64, True), (8, 0, True)]
IDS = [f"bits{bits}-g{group}-{'sym' if symmetric else 'asym'}" for bits, group, symmetric in SCHEMES]


def restored(x: Floats) -> Floats:
    """What is left of activations that the kernels quantize."""
    return reference.restored_activations(x).astype(np.float32)


def unit_weight(rows: int, cols: int, scheme: tuple[int, int, bool], seed: int) -> Weight:
    """A random matrix whose products with normal rows are about normal."""
    weight = Weight(rows, cols, *scheme, seed=seed)
    size = reference.dequantize(weight.shape, weight.codes, weight.scales, weight.zeros).std() * cols**0.5
    weight.scales = (weight.scales / size).astype(np.float16)
    codes = storage(weight.shape.bits, weight.codes)
    weight.panels = native.pack(weight.shape, codes, weight.scales, weight.zeros)
    return weight


class Layer:
    """Random experts in panels and in floats."""

    def __init__(
        self, spec: MixtureOfExpertsSpec, hidden: int, wide: int, scheme: tuple[int, int, bool] = SCHEMES[0]
    ) -> None:
        self.spec, self.hidden = spec, hidden
        rng = np.random.default_rng(hidden)
        sizes = {"w1": (wide, hidden), "w3": (wide, hidden), "w2": (hidden, wide)}
        self.weights = {
            name: [unit_weight(*size, scheme, seed=100 * i + e) for e in range(spec.num_experts)]
            for i, (name, size) in enumerate(sizes.items())
        }
        self.shapes: tuple[NBitsShape, NBitsShape] = (
            self.weights["w1"][0].shape,
            self.weights["w2"][0].shape,
        )
        self.panels = tuple(np.concatenate([w.panels for w in part]) for part in self.weights.values())
        self.router = (rng.standard_normal((spec.num_experts, hidden)) * 2 / hidden**0.5).astype(np.float32)

    def floats(self, name: str) -> list[Floats]:
        return [reference.dequantize(w.shape, w.codes, w.scales, w.zeros) for w in self.weights[name]]

    def inputs(self, rows: int, seed: int = 7) -> tuple[Floats, Floats]:
        rng = np.random.default_rng(seed)
        x, residual = rng.standard_normal((2, rows, self.hidden)).astype(np.float32)
        return x, residual

    def run(
        self, x: Floats, residual: Floats, *, threads: int = 2, isa: Isa | None = None, scale: float = 0.7
    ) -> Floats:
        with ThreadPool(threads) as pool:
            arguments = (self.spec, self.shapes, self.panels, self.router, x)
            poison = np.full_like(x, np.nan)
            return mixture_of_experts(
                pool,
                *arguments,  # type: ignore[arg-type]
                residual=residual,
                scale=scale,
                isa=isa,
                out=poison,
            )


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_it_is_the_definition(scheme: tuple[int, int, bool], rows: int) -> None:
    check(Layer(MixtureOfExpertsSpec(5, 2), 64, 128, scheme), rows)


@pytest.mark.parametrize(("hidden", "wide"), [(44, 100), (7, 33), (96, 20)])
@pytest.mark.parametrize("experts", [(1, 1), (3, 3), (7, 2)])
def test_sizes_that_fill_no_panel_or_block(hidden: int, wide: int, experts: tuple[int, int]) -> None:
    layer = Layer(MixtureOfExpertsSpec(*experts), hidden, wide, (8, 0, True))
    for rows in (1, 6):
        check(layer, rows)


def check(layer: Layer, rows: int) -> None:
    """With the kernels' roundings of activations, before the gate and after it."""
    x, residual = layer.inputs(rows)
    logits = (x @ layer.router.T)[None]
    case = Case(layer.spec, x[None], logits, *(layer.floats(name) for name in ("w1", "w3", "w2")))
    shares = case.shares()[0]
    expected = np.zeros_like(x, np.float64)
    seen = restored(x)
    for expert, (w1, w3, w2) in enumerate(zip(*case.weights, strict=True)):
        gate = seen @ w1.T
        inner = restored((gate / (1 + np.exp(-gate)) * (seen @ w3.T)).astype(np.float32))
        expected += shares[:, expert, None] * (inner @ w2.T)
    got = layer.run(x, residual)
    error = np.abs(got - (residual + 0.7 * expected))
    # A value on a rounding boundary may get the other int8 code.
    assert np.percentile(error, 90) < 1e-5 * expected.std() and error.max() < 0.02 * expected.std()


@pytest.mark.parametrize("rows", [1, 3, 29])
def test_every_path_and_thread_count_gives_the_same_routes(rows: int) -> None:
    layer = Layer(MixtureOfExpertsSpec(8, 2), 64, 96)
    x, residual = layer.inputs(rows)
    expected = layer.run(x, residual, threads=1, isa=Isa.SCALAR)
    for isa in available_isas():
        whole = layer.run(x, residual, threads=1, isa=isa)
        # The gate's exponential differs in its last bits between the paths.
        np.testing.assert_allclose(whole, expected, atol=2e-2 * expected.std())
        for threads in (2, 4):
            np.testing.assert_array_equal(layer.run(x, residual, threads=threads, isa=isa), whole)


def test_rows_do_not_depend_on_their_company() -> None:
    layer = Layer(MixtureOfExpertsSpec(6, 3), 64, 64)
    x, residual = layer.inputs(17)
    whole = layer.run(x, residual)
    for part in (slice(0, 1), slice(1, 9), slice(9, 17)):
        np.testing.assert_array_equal(layer.run(x[part], residual[part]), whole[part])


def test_the_weights_of_other_experts_are_not_read() -> None:
    """Scales of infinity in them would show."""
    layer = Layer(MixtureOfExpertsSpec(6, 2), 64, 64)
    x, residual = layer.inputs(1)
    expected = layer.run(x, residual)
    chosen = np.argsort(-(x @ layer.router.T)[0])[:2]
    for part in layer.panels:
        by_expert = part.reshape(6, -1)
        for expert in set(range(6)) - set(chosen.tolist()):
            by_expert[expert] = 0x7C  # float16 0x7c7c is not a number
    np.testing.assert_array_equal(layer.run(x, residual), expected)
    by_expert[chosen[0]] = 0x7C
    assert not np.isfinite(layer.run(x, residual)).all()


def test_ties_go_to_the_lowest_index() -> None:
    layer = Layer(MixtureOfExpertsSpec(4, 2), 64, 64)
    layer.router[:] = layer.router[0]
    x, residual = layer.inputs(3)
    two = Layer(MixtureOfExpertsSpec(4, 2), 64, 64)
    two.router[:2], two.router[2:] = layer.router[0], -layer.router[0]
    two.router *= np.sign(x @ layer.router[0])[0]
    np.testing.assert_array_equal(layer.run(x[:1], residual[:1]), two.run(x[:1], residual[:1]))


def test_what_does_not_fit_is_refused() -> None:
    layer = Layer(MixtureOfExpertsSpec(4, 2), 64, 64)
    x, residual = layer.inputs(2)
    layer.shapes = (layer.shapes[0], NBitsShape(64, 96, 4, 32))
    with pytest.raises(NativeError, match="do not take this shape"):
        layer.run(x, residual)

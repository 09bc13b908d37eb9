"""The latent attention kernel against its formula with expanded keys and values, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas
from cpm_edge.plugins.sparse_attention.native_latent import (
    Floats,
    Halves,
    LatentSizes,
    UpProjection,
    latent_attention,
)

Float64s = npt.NDArray[np.float64]
# The other vector paths are the AVX2 one.
ISAS = [isa for isa in available_isas() if isa in (Isa.SCALAR, Isa.AVX2)]
BY_ISA = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)

MINICPM3 = LatentSizes(40, 256, 64, 32, 64, 96**-0.5)
SMALL = LatentSizes(5, 48, 10, 8, 16, 18**-0.5, epsilon=1e-3)
WIDE_ROPE = LatentSizes(3, 32, 7, 16, 32, 0.2)
EXPANDED = 96  # kExpandedRows of kernels/latent_attention.h


@dataclass(frozen=True)
class Case:
    """Arguments of a call; the cache holds NaN wherever no row is valid."""

    sizes: LatentSizes
    query: Floats
    latent: Floats
    norm: Floats
    rotation: tuple[Floats, Floats]
    up: UpProjection
    cache: Halves
    past: int

    def rows(self, start: int, stop: int) -> Case:
        """Some of the new rows, after those before them."""
        part = slice(start, stop)
        cosine, sine = (table[part] for table in self.rotation)
        return replace(
            self,
            query=self.query[part],
            latent=self.latent[part],
            rotation=(cosine, sine),
            past=self.past + start,
        )


def make_case(sizes: LatentSizes, rows: int, past: int, *, groups: int = 1, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Floats:
        return rng.standard_normal(shape, np.float32)

    cache = np.full((past + rows + 5, sizes.width), np.nan, np.float16)
    cache[:past] = normal(past, sizes.width)
    angle = rng.uniform(0, 6, (rows, sizes.rope_size // 2)).astype(np.float32)
    scales = rng.uniform(0.5, 1.5, (sizes.up_rows, groups)).astype(np.float32)
    return Case(
        sizes,
        query=normal(rows, sizes.num_heads * sizes.query_size),
        latent=normal(rows, sizes.width),
        norm=1 + 0.2 * normal(sizes.rank),
        rotation=(np.cos(angle), np.sin(angle)),
        up=UpProjection(
            rng.integers(-128, 128, (sizes.up_rows, sizes.rank)).astype(np.int8),
            scales * np.float32(0.02 / sizes.rank**0.5),
        ),
        cache=cache,
        past=past,
    )


def run(case: Case, pool: ThreadPool, isa: Isa | None = None) -> tuple[Floats, Halves]:
    """Output, poisoned before the call, and the cache afterwards."""
    sizes, cache = case.sizes, case.cache.copy()
    out = np.full((len(case.query), sizes.num_heads * sizes.value_size), np.nan, np.float32)
    latent_attention(
        pool, sizes, case.query, case.latent, case.norm, case.rotation, case.up, cache, case.past,
        isa=isa, out=out,
    )  # fmt: skip
    return out, cache


def turned(rows: Float64s, cosine: Float64s, sine: Float64s) -> Float64s:
    first, second = np.split(rows, 2, -1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def new_rows(case: Case) -> Float64s:
    """What the cache is to receive, unrounded."""
    sizes = case.sizes
    cosine, sine = (table.astype(np.float64) for table in case.rotation)
    latent, key = (part.astype(np.float64) for part in np.split(case.latent, [sizes.rank], 1))
    latent = latent / np.sqrt((latent**2).mean(1, keepdims=True) + sizes.epsilon) * case.norm
    return np.concatenate([latent, turned(key, cosine, sine)], 1)


def expected(case: Case, cache: Halves) -> Float64s:
    """The output, on the rows as the cache keeps them."""
    sizes, count = case.sizes, len(case.query)
    heads, nope, rank, total = sizes.num_heads, sizes.nope_size, sizes.rank, case.past + count
    rows = cache[:total].astype(np.float64)
    codes = case.up.codes.astype(np.float64).reshape(*case.up.scales.shape, -1)
    up = (codes * case.up.scales[:, :, None]).reshape(heads, nope + sizes.value_size, rank)
    keys = np.einsum("hdr,sr->hsd", up[:, :nope], rows[:, :rank])
    values = np.einsum("hdr,sr->hsd", up[:, nope:], rows[:, :rank])
    cosine, sine = (table.astype(np.float64)[:, None] for table in case.rotation)
    query = case.query.astype(np.float64).reshape(count, heads, -1)
    scores = np.einsum("thd,hsd->hts", query[..., :nope], keys)
    scores += np.einsum("thd,sd->hts", turned(query[..., nope:], cosine, sine), rows[:, rank:])
    hidden = np.arange(total) > case.past + np.arange(count)[:, None]
    scores = np.where(hidden, -np.inf, scores * sizes.scale)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.asarray(np.einsum("hts,hsd->thd", weights, values).reshape(count, -1))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPool]:
    with ThreadPool(2) as threads:
        yield threads


@BY_ISA
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("rows", "past"), [(1, 0), (1, 300), (3, 63), (7, 1000), (95, 33), (96, 33), (200, 61)]
)
@pytest.mark.parametrize("sizes", [SMALL, WIDE_ROPE], ids=["small", "wide-rope"])
def test_both_forms_are_the_formula(
    pool: ThreadPool, sizes: LatentSizes, rows: int, past: int, groups: int, isa: Isa
) -> None:
    case = make_case(sizes, rows, past, groups=groups)
    output, cache = run(case, pool, isa)
    np.testing.assert_array_equal(cache[:past], case.cache[:past])
    stored, exact = cache[past : past + rows].astype(np.float64), new_rows(case)
    assert (np.abs(stored - exact) <= np.maximum(np.abs(exact) * 2.0**-11, 2.0**-24) * 1.01).all()
    assert np.isnan(cache[past + rows :]).all()
    truth = expected(case, cache)
    assert truth.std() > 0.1
    np.testing.assert_allclose(output, truth, atol=4e-6)


@pytest.mark.parametrize(("rows", "past"), [(1, 500), (EXPANDED, 100)])
def test_the_sizes_of_minicpm3(pool: ThreadPool, rows: int, past: int) -> None:
    case = make_case(MINICPM3, rows, past)
    output, cache = run(case, pool)
    # float32 sums of 256 products, of values up to 4; measured 8e-6
    np.testing.assert_allclose(output, expected(case, cache), atol=2e-5)


@pytest.mark.parametrize("chunks", [(1, 30, 97, 72), (200,), (95, 105), (96, 104)], ids=str)
def test_chunks_differ_by_rounding_alone(pool: ThreadPool, chunks: tuple[int, ...]) -> None:
    case = make_case(SMALL, 200, 40)
    cache, outputs, start = case.cache, [], 0
    for count in chunks:
        output, cache = run(replace(case.rows(start, start + count), cache=cache), pool)
        outputs.append(output)
        start += count
    np.testing.assert_allclose(np.concatenate(outputs), expected(case, cache), atol=4e-6)


@pytest.mark.parametrize("rows", [1, 5, 130])
def test_threads_change_no_bit(rows: int) -> None:
    case = make_case(MINICPM3 if rows == 1 else SMALL, rows, 900)
    results = []
    for threads in (1, 2, 3, 4):
        with ThreadPool(threads) as pool:
            results.append(run(case, pool)[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_large_scores_do_not_overflow(pool: ThreadPool) -> None:
    for rows in (2, 130):
        case = make_case(SMALL, rows, 70)
        case = replace(case, query=case.query * 1000)
        output, cache = run(case, pool)
        assert np.isfinite(output).all()
        np.testing.assert_allclose(output, expected(case, cache), atol=2e-3)


@pytest.mark.parametrize(
    "changes", [{"value_size": 24}, {"rope_size": 12}, {"rank": 44}], ids=["value", "rope", "rank"]
)
def test_sizes_that_no_kernel_takes(pool: ThreadPool, changes: dict[str, int]) -> None:
    case = make_case(replace(SMALL, **changes), 2, 3)
    with pytest.raises(NativeError, match="do not take this shape"):
        run(case, pool)


def test_groups_that_no_vector_fills(pool: ThreadPool) -> None:
    with pytest.raises(NativeError, match="do not take this shape"):
        run(make_case(SMALL, 2, 3, groups=4), pool)


def test_more_rows_than_the_cache_has_left(pool: ThreadPool) -> None:
    case = make_case(SMALL, 4, 10)
    with pytest.raises(NativeError, match="4 rows after 16: the new rows do not fit the cache"):
        run(replace(case, past=16), pool)


def test_arrays_that_do_not_fit_are_named(pool: ThreadPool) -> None:
    case = make_case(SMALL, 4, 10)
    with pytest.raises(NativeError, match=r"latent: expected \(4, 56\), got \(3, 56\)"):
        run(replace(case, latent=case.latent[:3]), pool)
    with pytest.raises(NativeError, match=r"codes: expected \(130, 48\), got \(129, 48\)"):
        run(replace(case, up=UpProjection(case.up.codes[1:], case.up.scales)), pool)

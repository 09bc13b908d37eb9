"""From a checkpoint to logits: every variant on every target against the numpy model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.errors import ContextError
from cpm_edge.runtimes.openvino.stock import OpenVinoEngine
from cpm_edge.runtimes.session import Session
from tests.support.bundles import PROMPT_LENGTH, TARGETS, Bundles
from tests.support.checkpoints import TERNARY, TERNARY_WIDE, VARIANTS, make_tensors
from tests.support.numpy_model import NumpyRun
from tests.support.packed import WIDE
from tests.support.qat import QATS

Record = Callable[[str, object], None]
Logits = npt.NDArray[Any]

TOLERANCE = 2e-3
CHUNKINGS = {
    "one chunk": [PROMPT_LENGTH],
    "odd chunks": [1, 30, 33, 97, 5, 100, 67],
    "token by token": [1] * PROMPT_LENGTH,
}
FORMATS: dict[str, dict[str, Any]] = {
    "int4 sym": {"weight_format": "int4", "group_size": 32},
    "int4 asym": {"weight_format": "int4", "group_size": 32, "symmetric": False},
    "int8": {"weight_format": "int8"},
    "fp16": {"weight_format": "fp16"},
    "bf16": {"weight_format": "bf16"},
}
for_targets = pytest.mark.parametrize("target", TARGETS)


def feed(session: Session, ids: npt.NDArray[np.int64], chunks: Sequence[int]) -> Logits:
    """Logits (T, vocab) of the ids given chunk by chunk; single tokens take the decode path."""
    rows, start = [], 0
    for size in chunks:
        chunk = ids[start : start + size]
        rows.append(session.forward(chunk)[None] if size == 1 else session.forward(chunk, "all").copy())
        start += size
    assert start == len(ids)
    return np.concatenate(rows)


def check(got: Logits, expected: NumpyRun, record: Record) -> None:
    """Every row agrees; only rows from a near-tie on, which rounding may turn, are forgiven and counted."""
    error: Logits = np.abs(got - expected.logits).max(1)
    ties = [position for _, position in expected.near_ties()]
    forgiven = np.arange(len(error)) >= min(ties, default=len(error))
    wrong = error > TOLERANCE
    for key, value in {**expected.count(), "near_ties_excluded": int((wrong & forgiven).sum())}.items():
        record(key, value)
    record("max_abs_error", np.max(error[~(wrong & forgiven)]))
    assert not (wrong & ~forgiven).any(), f"{error.max():.2e} at {np.flatnonzero(wrong)}"
    assert (wrong & forgiven).mean() < 0.05


def test_the_references_are_what_the_tests_need(bundles: Bundles) -> None:
    """Logits of a model's size, and prompts far past dense_len and the block budget, with exact ties."""
    for variant, config in VARIANTS.items():
        reference = bundles.reference(variant)
        assert 2.5 < reference.logits.std() < 3.5
        sparse = config.get("sparse_config")
        if sparse:
            assert 4 * sparse["dense_len"] <= PROMPT_LENGTH
            count = reference.count()
            assert count["over_budget"] > 1000 and count["exact_ties_included"] > 100


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
@for_targets
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_at_every_position(
    bundles: Bundles, variant: str, target: str, chunks: list[int], record_property: Record
) -> None:
    with bundles.engine(variant, target).session() as session:
        check(feed(session, bundles.prompt, chunks), bundles.reference(variant), record_property)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_torch_modules(bundles: Bundles, variant: str, record_property: Record) -> None:
    check(bundles.stored(variant, "ort"), bundles.reference(variant), record_property)


@for_targets
def test_llama_as_transformers_computes_it(bundles: Bundles, target: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in VARIANTS["llama"].items() if key != "architectures"}
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.eval()
    weights = make_tensors(VARIANTS["llama"])
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    with torch.no_grad():
        expected = model(torch.from_numpy(bundles.prompt)[None]).logits[0].numpy()
    with bundles.engine("llama", target).session() as session:
        got = session.forward(bundles.prompt, "all")
        assert np.abs(got - expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("variant", "format_"),
    [
        *((v, f) for v in ("llama", "tied-mha", "minicpm3") for f in FORMATS),
        ("sparse", "int4 sym"),
        ("sparse", "int8"),
        ("sala", "int4 sym"),
    ],
)
@for_targets
def test_stored_weights_are_what_the_engine_computes_with(
    bundles: Bundles, variant: str, target: str, format_: str, record_property: Record
) -> None:
    """Against the torch modules on the dequantized weights: what is left is rounding of the arithmetic."""
    options = FORMATS[format_] | ({"kv_cache": "fp32"} if target == "aipc" else {})
    expected = bundles.stored(variant, target, **options)
    with bundles.engine(variant, target, **options).session() as session:
        error = np.abs(session.forward(bundles.prompt, "all") - expected).max(1)
    record_property("max_abs_error", float(error.max()))
    assert error.max() <= TOLERANCE
    # The weights differ from the checkpoint's, or this would not test the format.
    assert np.abs(expected - bundles.reference(variant).logits).max() > 1e-3


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
@for_targets
@pytest.mark.parametrize("variant", [*TERNARY, TERNARY_WIDE])
def test_ternary_layers_compute_what_the_checkpoint_does(
    bundles: Bundles, variant: str, target: str, chunks: list[int], record_property: Record
) -> None:
    """Nothing was rounded: with embedding and head as they are, the logits are those of the checkpoint."""
    options = {"weight_format": "ternary", "embedding_format": "fp32", "head_format": "fp32"}
    options |= {"kv_cache": "fp32"} if target == "aipc" else {}
    with bundles.engine(variant, target, **options).session() as session:
        check(feed(session, bundles.prompt, chunks), bundles.reference(variant), record_property)


@pytest.mark.filterwarnings("ignore:2 linear layers are stored as Q6_K")
@for_targets
@pytest.mark.parametrize(
    "variant",
    [
        "gptq",
        "gptq-asym",
        "gptq-v2",
        "gptq-act-order-asym",
        "gptq-row",
        "gptq-floats",
        WIDE,
        "awq",
        "marlin",
        "gguf-q4_0",
        "gguf-q4_1-zeros",
        "gguf-q8_0",
        "gguf-mixed",
        "gguf-tq1_0",
        "gguf-tq2_0",
        "llama-gguf-q4_0",
        "minicpm3-gguf-q4_0",
        "minicpm3-gguf-q8_0",
        *QATS,
    ],
)
def test_packed_layers_compute_what_the_checkpoint_does(
    bundles: Bundles, variant: str, target: str, record_property: Record
) -> None:
    """Nothing was rounded but the layers whose integers have no equal, or that have none: these to int8."""
    options = {"weight_format": "auto", "embedding_format": "fp32", "head_format": "fp32"}
    options |= {"kv_cache": "fp32"} if target == "aipc" else {}
    with bundles.engine(variant, target, **options).session() as session:
        got = feed(session, bundles.prompt, CHUNKINGS["odd chunks"])
    assert np.abs(got - bundles.stored(variant, target, **options)).max() <= TOLERANCE
    if variant in QATS:
        # Trained weights are rounded products; the bundle has the products.
        error = np.abs(got - bundles.reference(variant).logits)
        assert error.mean() < (0.15 if QATS[variant].floats else 0.02)
    elif variant not in ("gptq-floats", "gguf-mixed"):
        check(got, bundles.reference(variant), record_property)


@for_targets
def test_int8_activations_of_ternary_layers(bundles: Bundles, target: str) -> None:
    options = {"weight_format": "ternary", "activations": "int8"}
    expected = bundles.stored("ternary", target, **options)
    with bundles.engine("ternary", target, **options).session() as session:
        error = np.abs(session.forward(bundles.prompt, "all") - expected)
    assert error.std() < 0.15


@pytest.mark.parametrize(("embedding", "head"), [("fp16", "bf16"), ("int8", "fp32"), ("fp32", "int8")])
@for_targets
def test_formats_of_embedding_and_head(bundles: Bundles, target: str, embedding: str, head: str) -> None:
    options = {"weight_format": "int4", "embedding_format": embedding, "head_format": head}
    cache = {"kv_cache": "fp32"} if target == "aipc" else {}
    expected = bundles.stored("llama", target, **options, **cache)
    with bundles.engine("llama", target, **options, **cache).session() as session:
        assert np.abs(session.forward(bundles.prompt, "all") - expected).max() <= TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "sparse"])
def test_a_half_precision_cache_costs_little(bundles: Bundles, variant: str) -> None:
    with bundles.engine(variant, "aipc", kv_cache="fp16").session() as session:
        got = session.forward(bundles.prompt, "all")
    error = np.abs(got - bundles.reference(variant).logits).max(1)
    assert np.median(error) < 0.02


@for_targets
def test_int8_activations_cost_little(bundles: Bundles, target: str, record_property: Record) -> None:
    options = {"weight_format": "int4", "activations": "int8"}
    expected = bundles.stored("llama", target, **options)
    engine = bundles.engine("llama", target, **options)
    with engine.session() as session:
        error = np.abs(session.forward(bundles.prompt, "all") - expected)
    record_property("error_std", float(error.std()))
    assert error.std() < 0.15
    if target == "ort":
        assert error.max() > TOLERANCE, "the activations were not quantized"
    else:
        # OpenVINO does it only on CPUs with VNNI; everywhere it must know that it is wanted.
        assert isinstance(engine, OpenVinoEngine)
        assert engine.compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 32


@for_targets
@pytest.mark.parametrize("variant", ["llama", "sparse", "sala", "minicpm3"])
class TestSessions:
    def test_a_rewound_session_goes_on_as_if_nothing_had_been(
        self, bundles: Bundles, variant: str, target: str
    ) -> None:
        ids, expected = bundles.prompt, bundles.reference(variant).logits
        with bundles.engine(variant, target).session() as session:
            session.forward(ids[:200])
            session.forward(ids[:77])  # other tokens than the ones that follow
            session.rewind(77)
            assert session.position == 200 and session.tokens == ids[:200].tolist()
            np.testing.assert_allclose(session.forward(ids[200:260]), expected[259], atol=TOLERANCE)
            session.rewind(199)
            got = session.forward(ids[61:100], "all")
            np.testing.assert_allclose(got, expected[61:100], atol=TOLERANCE)

    def test_a_reset_session_is_new(self, bundles: Bundles, variant: str, target: str) -> None:
        with bundles.engine(variant, target).session() as session:
            session.forward(bundles.prompt[::-1])
            session.reset()
            assert session.position == 0
            got = session.forward(bundles.prompt[:90], "all")
            np.testing.assert_allclose(got, bundles.reference(variant).logits[:90], atol=TOLERANCE)

    def test_forks_are_independent(self, bundles: Bundles, variant: str, target: str) -> None:
        ids, expected = bundles.prompt, bundles.reference(variant).logits
        with bundles.engine(variant, target).session() as session:
            session.forward(ids[:120])
            with session.fork() as twin:
                assert twin.tokens == session.tokens
                twin.forward(ids[:50])
                np.testing.assert_allclose(session.forward(ids[120:150]), expected[149], atol=TOLERANCE)
                twin.rewind(50)
                session.close()
                np.testing.assert_allclose(twin.forward(ids[120:150]), expected[149], atol=TOLERANCE)

    def test_the_context_is_a_limit(self, bundles: Bundles, variant: str, target: str) -> None:
        engine = open_engine(bundles.open(variant, target), threads=2, max_context=50)
        with engine.session() as session:
            with pytest.raises(ContextError, match="51 tokens do not fit: 0 of 50 positions are taken"):
                session.forward(bundles.prompt[:51])
            assert session.position == 0
            session.forward(bundles.prompt[:49])
            got = session.forward(bundles.prompt[49:50])
            np.testing.assert_allclose(got, bundles.reference(variant).logits[49], atol=TOLERANCE)
            with pytest.raises(ContextError, match="1 tokens do not fit: 50 of 50"):
                session.forward([1])
        engine.close()

    def test_the_last_row_is_the_last_of_all_rows(self, bundles: Bundles, variant: str, target: str) -> None:
        with bundles.engine(variant, target).session() as session:
            last = session.forward(bundles.prompt[:100])
            session.reset()
            every = session.forward(bundles.prompt[:100], "all")
            assert last.shape == (320,) and every.shape == (100, 320)
            np.testing.assert_allclose(last, every[-1], atol=1e-5)

"""MLPs with a threshold on the gate, natively: what decode steps read is counted, and told to the user."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpm_edge.exporter.eager import build_model, empty_caches, load_weights
from cpm_edge.runtimes.generate import Stream
from cpm_edge.runtimes.options import GenerationOptions
from cpm_edge.runtimes.session import Engine
from cpm_edge.runtimes.tokenizer import Tokenizer
from tests.support.bundles import NATIVE, Bundles


@pytest.fixture(scope="module")
def engine(bundles: Bundles) -> Engine:
    return bundles.engine("fatrelu", "aipc", **NATIVE)


def active_neurons(bundles: Bundles, tokens: list[int]) -> tuple[int, int]:
    """Neurons of the modules on the stored weights at the last token: all, and those whose gate passes."""
    with bundles.plan("fatrelu", "aipc", **NATIVE) as (plan, weights):
        config = plan.config
        model = build_model(plan.architecture.model_class(), config, config.rope.table(plan.max_context))
        load_weights(model, "", weights.dequantized, config.tie_word_embeddings)
    gates: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("gate_proj"):
            module.register_forward_hook(lambda _, __, output: gates.append(output[0, -1]))
    with torch.no_grad():
        ids = torch.tensor([tokens])
        model(ids, torch.zeros(1, dtype=torch.int64), empty_caches(config, len(tokens), 1))
    assert config.gate_threshold is not None
    active = sum(int((gate > config.gate_threshold).sum()) for gate in gates)
    return sum(len(gate) for gate in gates), active


def test_the_count_is_that_of_the_modules(bundles: Bundles, engine: Engine) -> None:
    """Up to gates that int8 activations push across the threshold."""
    tokens = bundles.prompt[:41].tolist()
    neurons, active = active_neurons(bundles, tokens)
    with engine.session() as session:
        session.forward(tokens[:40])
        assert session.mlp_sparsity() is None  # several rows at once read everything
        session.forward(tokens[40:])
        counted = session.mlp_sparsity()
        assert counted is not None
        assert counted.neurons == neurons == 2 * 96
        assert abs(counted.active - active) <= 4 and 10 < active < neurons / 2
        assert 0 < counted.read_bytes < counted.weight_bytes
        with session.fork() as twin:
            assert twin.mlp_sparsity() is None


def test_a_generation_tells_what_its_decode_steps_left_out(bundles: Bundles, engine: Engine) -> None:
    tokenizer = Tokenizer.from_bundle(bundles.open("fatrelu", "aipc", **NATIVE))
    options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    session = engine.session()
    session.forward(bundles.prompt[:1])  # counted, but no part of the generation
    before = session.mlp_sparsity()
    stream = Stream(session, tokenizer, bundles.prompt[:20].tolist(), options)
    list(stream)
    found = stream.result.stats.mlp_sparsity
    assert before is not None and found is not None
    assert found.neurons == 5 * before.neurons  # the first token comes from the prompt
    assert ("MLP sparsity", str(found)) in stream.result.stats.rows()


@pytest.mark.parametrize(("variant", "target"), [("fatrelu", "ort"), ("llama", "aipc")])
def test_what_reads_everything_counts_nothing(bundles: Bundles, variant: str, target: str) -> None:
    options = NATIVE if target == "aipc" else {}
    with bundles.engine(variant, target, **options).session() as session:
        session.forward(bundles.prompt[:3])
        session.forward(bundles.prompt[3:4])
        assert session.mlp_sparsity() is None


def test_a_single_token_gets_the_same_logits_as_among_others(bundles: Bundles, engine: Engine) -> None:
    """Both ways through the weights, at the first position: no cache that rounding could change before."""
    tokens = bundles.prompt[:2]
    with engine.session() as alone, engine.session() as together:
        expected = together.forward(tokens, logits="all")[0]
        np.testing.assert_allclose(alone.forward(tokens[:1]), expected, atol=1e-5 * expected.std())

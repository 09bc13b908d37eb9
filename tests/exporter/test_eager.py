from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpm_edge.exporter import eager
from cpm_edge.exporter.configs import MiniCPMConfig
from cpm_edge.exporter.models import minicpm
from tests.support.checkpoints import VARIANTS, make_tensors, prompt

IDS = prompt(100)


def whole_model(variant: str) -> tuple[Any, MiniCPMConfig, dict[str, Any]]:
    config = MiniCPMConfig.from_dict(VARIANTS[variant])
    table = config.rope.table(config.max_context)
    weights = make_tensors(VARIANTS[variant]) | {"rotary.inv_freq": table.inv_freq}
    model = eager.build_model(minicpm.Model, config, table)
    eager.load_weights(model, "", weights.__getitem__, config.tie_word_embeddings)
    return model, config, weights


def test_a_model_is_built_without_memory() -> None:
    config = MiniCPMConfig.from_dict(VARIANTS["sparse"] | {"hidden_size": 2**16, "head_dim": 16})
    model = eager.build_model(minicpm.Model, config, config.rope.table(64))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("variant", ["tied-mha", "longrope", "sparse"])
def test_a_layer_at_a_time_is_the_whole_model(variant: str) -> None:
    model, config, weights = whole_model(variant)
    read: list[str] = []

    def reader(name: str) -> Any:
        read.append(name)
        return weights[name]

    table = config.rope.table(config.max_context)
    run = eager.run_streamed(minicpm.Model, config, table, reader, IDS.tolist())
    with torch.no_grad():
        logits, presents = model(
            torch.from_numpy(IDS)[None], torch.zeros(1, dtype=torch.int64), eager.empty_caches(config, 112)
        )
    np.testing.assert_allclose(run.logits, logits[0].numpy(), atol=1e-5)
    for keys, (present, _) in zip(run.keys, presents, strict=True):
        np.testing.assert_allclose(keys, present[0, :, :100].numpy(), atol=1e-5)
    assert set(read) == set(weights)
    assert len(read) == len(weights) + config.tie_word_embeddings  # a tied matrix is read twice


def test_sequences_of_any_length_share_one_reading() -> None:
    _, config, weights = whole_model("sparse")
    table = config.rope.table(config.max_context)
    read: list[str] = []

    def reader(name: str) -> Any:
        read.append(name)
        return weights[name]

    sequences = [IDS.tolist(), IDS[:7].tolist(), IDS[50:90].tolist()]
    runs = list(eager.run_all_streamed(minicpm.Model, config, table, reader, sequences))
    assert len(read) == len(weights) + config.tie_word_embeddings
    for ids, run in zip(sequences, runs, strict=True):
        alone = eager.run_streamed(minicpm.Model, config, table, weights.__getitem__, ids)
        np.testing.assert_array_equal(run.logits, alone.logits)
        np.testing.assert_array_equal(run.keys[-1], alone.keys[-1])


@pytest.mark.parametrize("variant", ["longrope", "sparse"])
def test_chunks_and_steps_are_the_whole_prompt(variant: str) -> None:
    model, config, _ = whole_model(variant)
    with torch.no_grad():
        ids, past = torch.from_numpy(IDS)[None], torch.zeros(1, dtype=torch.int64)
        expected, _ = model(ids, past, eager.empty_caches(config, 112))
        caches, rows = eager.empty_caches(config, 112), []
        for start, stop in ((0, 1), (1, 34), (34, 98), (98, 99), (99, 100)):
            logits, caches = model(ids[:, start:stop], past + start, caches)
            rows.append(logits)
    np.testing.assert_allclose(torch.cat(rows, 1).numpy(), expected.numpy(), atol=2e-5)

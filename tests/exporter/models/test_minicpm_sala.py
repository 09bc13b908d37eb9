"""MiniCPM-SALA's modules: any chunking gives the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpm_edge.exporter import eager
from cpm_edge.exporter.configs import MiniCPMSALAConfig
from cpm_edge.exporter.models import minicpm_sala
from tests.support.checkpoints import VARIANTS, make_tensors, prompt

IDS = prompt(200)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["sala", "sala-dense"])
def test_chunks_steps_and_streamed_layers_are_the_whole_prompt(variant: str) -> None:
    config = MiniCPMSALAConfig.from_dict(VARIANTS[variant])
    table = config.rope.table(config.max_context)
    weights = make_tensors(VARIANTS[variant]) | {"rotary.inv_freq": table.inv_freq}
    model: Any = eager.build_model(minicpm_sala.Model, config, table)
    eager.load_weights(model, "", weights.__getitem__, config.tie_word_embeddings)

    ids, past = torch.from_numpy(IDS)[None], torch.zeros(1, dtype=torch.int64)
    expected, presents = model(ids, past, eager.empty_caches(config, len(IDS)))
    caches, rows = eager.empty_caches(config, len(IDS)), []
    for start, stop in ((0, 1), (1, 34), (34, 199), (199, 200)):
        logits, caches = model(ids[:, start:stop], past + start, caches)
        rows.append(logits)
    np.testing.assert_allclose(torch.cat(rows, 1).numpy(), expected.numpy(), atol=1e-4)

    run = eager.run_streamed(minicpm_sala.Model, config, table, weights.__getitem__, IDS.tolist())
    np.testing.assert_allclose(run.logits, expected[0].numpy(), atol=1e-5)
    for layer, (mark, whole, pieces) in enumerate(zip(run.keys, presents, caches, strict=True)):
        shape = (4, 24, 24) if variant == "sala" else (8, 16, 16)
        assert mark.shape == (shape if config.is_recurrent(layer) else (2, len(IDS), 16))
        np.testing.assert_allclose(mark, whole[0][0].numpy(), atol=1e-5)
        np.testing.assert_allclose(pieces[0].numpy(), whole[0].numpy(), atol=1e-4)

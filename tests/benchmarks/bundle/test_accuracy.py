"""``cpm-bench accuracy`` on tiny bundles: exact where nothing is rounded, worse where much is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from cpm_edge.benchmarks.bundle.accuracy import Settings, reference_of, score, summary
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.perplexity import perplexity
from cpm_edge.runtimes import load

if TYPE_CHECKING:
    from tests.support.bundles import Bundles

SETTINGS = Settings(window=40, windows=2, prompt=10, new_tokens=6)


def windows(bundles: Bundles) -> list[np.ndarray]:
    return [bundles.prompt[:40], bundles.prompt[40:80]]


def test_a_bundle_in_full_precision_is_its_checkpoint(bundles: Bundles) -> None:
    result = bundles.result("llama", "ort")
    with load(result.folder) as model:
        found = score(
            model, reference_of(result.manifest, str(bundles.checkpoint("llama"))), windows(bundles), SETTINGS
        )
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-4)
    assert found["kl"] < 1e-6 and found["top1"] == 1
    assert found["greedy"] == {
        "first_divergence": [None, None],
        "summary": "2 of 2 continuations of 6 tokens are the same",
    }


def test_rounding_shows_and_perplexity_is_that_of_the_other_command(bundles: Bundles) -> None:
    options = {"weight_format": "int4", "group_size": 32}
    result = bundles.result("llama", "ort", **options)
    with load(result.folder) as model:
        found = score(
            model, reference_of(result.manifest, str(bundles.checkpoint("llama"))), windows(bundles), SETTINGS
        )
        with model.session() as session:
            other = perplexity(session, np.concatenate(windows(bundles)), window=40)
    assert found["perplexity"] == pytest.approx(other, rel=1e-6)
    assert found["kl"] > 1e-4 and found["top1"] < 1


def test_a_reference_of_another_model_is_refused(bundles: Bundles) -> None:
    manifest = bundles.result("llama", "ort").manifest
    reference = reference_of(manifest, str(bundles.checkpoint("minicpm3")))
    with pytest.raises(BenchError, match="--reference: expected vocabulary"):
        next(reference([[1, 2, 3]]))


def test_where_texts_part_in_words() -> None:
    assert (
        summary([None, 7, 3], 64)
        == "1 of 3 continuations of 64 tokens are the same, the others part at token 3, 7"
    )

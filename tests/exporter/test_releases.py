from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.exporter.configs import MiniCPMSALAConfig
from cpm_edge.exporter.registry import ARCHITECTURES, BY_KEY, find_architecture
from cpm_edge.exporter.releases import REFERENCES, RELEASES, Release
from cpm_edge.plugins.linear_attention.launches import linear_attention_plan
from cpm_edge.plugins.sparse_attention.launches import plan as attention_plan
from tests.runtimes.openvino.test_native import VARIANTS as NATIVE_VARIANTS
from tests.support.checkpoints import config_of as config_of_variant

DATA = Path(__file__).parents[1] / "data"
INFERRED: dict[str, list[str]] = json.loads((DATA / "inferred.json").read_text())
FAMILIES = {entry.name for entry in (*ARCHITECTURES.values(), *BY_KEY.values())}
of_releases = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.names)

# Features that a config shows; "thinking" and "tools" are the chat template's, "ternary" the weights'.
# InfLLM-V2 is published for these models, whether or not their config asks for it.
IN_CONFIG: dict[str, Callable[[dict[str, Any]], bool]] = {
    "muP": lambda raw: raw.get("scale_emb", 1) != 1,
    "tied": lambda raw: raw.get("tie_word_embeddings", True),
    "LongRoPE": lambda raw: _rope(raw) == "longrope",
    "dynamic NTK": lambda raw: _rope(raw) == "dynamic",
    "FATReLU": lambda raw: raw["hidden_act"] == "fatrelu",
    "experts": lambda raw: bool(raw.get("num_experts")),
    "latent attention": lambda raw: "kv_lora_rank" in raw,
    "linear attention": lambda raw: "mixer_types" in raw,
}
ELSEWHERE = {"thinking", "tools", "ternary", "InfLLM-V2"}


def _rope(raw: dict[str, Any]) -> str | None:
    scaling = raw.get("rope_scaling") or {}
    return scaling.get("rope_type") or scaling.get("type")


def config_of(release: Release) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((DATA / "configs" / f"{release.config}.json").read_text())
    return config


def test_every_architecture_has_a_release_and_references() -> None:
    assert {release.family for release in RELEASES} == FAMILIES == set(REFERENCES)


def test_every_config_is_that_of_a_release() -> None:
    assert {release.config for release in RELEASES} == {path.stem for path in (DATA / "configs").iterdir()}


def test_no_model_is_listed_twice() -> None:
    names = [release.names for release in RELEASES]
    assert len(set(names)) == len(names)


@of_releases
def test_the_config_is_of_the_architecture_and_shows_the_features(release: Release) -> None:
    raw = config_of(release)
    assert find_architecture(raw).name == release.family
    features = set(release.features)
    assert features <= {*IN_CONFIG, *ELSEWHERE}
    assert features - ELSEWHERE == {name for name, shown in IN_CONFIG.items() if shown(raw)}


@of_releases
def test_what_is_inferred_is_marked(release: Release) -> None:
    assert release.inferred == (release.config in INFERRED)
    assert release.inferred == ("partly inferred" in release.tested)
    assert set(INFERRED.get(release.config, [])) <= set(config_of(release))


def test_the_native_flavour_is_claimed_where_it_is_tested() -> None:
    tested = [config_of_variant(variant) for variant in NATIVE_VARIANTS]
    families = {find_architecture(config).name for config in tested}
    gates = {config["hidden_act"] for config in tested}
    for release in RELEASES:
        covered = release.family in families and config_of(release)["hidden_act"] in gates
        assert release.native == covered, f"{release.names}: correct native= in exporter/releases.py"


@of_releases
def test_a_jetson_has_kernels_for_the_sizes_of_a_release(release: Release) -> None:
    raw = config_of(release)
    config = find_architecture(raw).config.from_dict(raw)
    spec = config.attention_spec(0)
    if spec.is_latent:
        assert "jetson stock" in release.targets
        return
    assert "jetson, rtx" in release.targets
    attention_plan(spec, config.head_dim, 8192)
    if isinstance(config, MiniCPMSALAConfig):
        linear_attention_plan(config.linear_spec(), config.lightning_head_dim, config.lightning_head_dim)

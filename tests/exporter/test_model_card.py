from __future__ import annotations

import pytest

from cpm_edge.runtimes.bundle import open_bundle
from tests.support.bundles import NATIVE, TARGETS, Bundles


@pytest.mark.parametrize("target", TARGETS)
def test_the_card_tells_what_the_bundle_is(bundles: Bundles, target: str) -> None:
    bundle = bundles.open("longrope", target, weight_format="int4")
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# longrope for {target}\n")
    assert f'pip install "cpm-edge[{target}]"' in card
    for fact in (
        bundle.manifest.weights["linear"],
        bundle.manifest.engine["requires"],
        "1024 tokens; RoPE: LongRoPE, long list for 1024 tokens",
        "| attention | dense |",
    ):
        assert fact in card, fact
    assert "{{" not in card and "None" not in card


def test_the_card_tells_what_ternary_layers_take(bundles: Bundles) -> None:
    card = (bundles.open("ternary", "aipc", weight_format="ternary").path / "README.md").read_text("utf-8")
    assert "| linear layers | ternary g128 as in the checkpoint, 0.3 MB, 13.3% of bf16 |" in card


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("gptq", "int4 g128 sym as in the checkpoint (GPTQ), 0.6 MB"),
        ("gguf-q8_0", "int8 g32 sym as in the checkpoint (Q8_0), 1.3 MB"),
        ("qat", "int4 g128 sym as in the checkpoint (trained int4), 0.6 MB"),
    ],
)
def test_the_card_tells_what_was_taken(bundles: Bundles, variant: str, words: str) -> None:
    options = {"embedding_format": "fp32", "head_format": "fp32"}
    bundle = bundles.open(variant, "ort", weight_format="auto", **options)
    card = (bundle.path / "README.md").read_text("utf-8")
    assert f"| linear layers | {words}" in card, card


def test_the_card_tells_how_much_of_the_mlps_was_read(bundles: Bundles) -> None:
    bundle = bundles.open("fatrelu", "aipc", **NATIVE, verify=True)
    verification = bundle.manifest.verification
    assert verification is not None
    shares = verification["mlp_sparsity"]
    assert 0.5 < shares["inactive_share"] < 1 and 0 < shares["read_share"] < 1
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    told = f"| MLP sparsity | {shares['inactive_share']:.1%} of neurons inactive in 8 decoded tokens, "
    assert told + f"{shares['read_share']:.1%} of up and down projections read |" in card
    other = bundles.open("fatrelu", "ort", weight_format="int4").path / "README.md"
    assert "MLP sparsity" not in other.read_text(encoding="utf-8")


def test_the_card_tells_when_attention_is_sparse(bundles: Bundles) -> None:
    card = (bundles.open("sparse", "ort").path / "README.md").read_text(encoding="utf-8")
    assert "InfLLM-V2 sparse from 64 tokens on: 3 blocks of 16 tokens and a window of 32" in card


def test_the_card_tells_which_layers_are_linear(bundles: Bundles) -> None:
    card = (bundles.open("sala-dense", "ort").path / "README.md").read_text(encoding="utf-8")
    assert "| attention | dense in 1 of 3 layers, linear with a state of fixed size in the others |" in card


@pytest.mark.parametrize("target", TARGETS)
def test_the_card_tells_what_latent_rows_save(bundles: Bundles, target: str) -> None:
    bundle = bundles.open("minicpm3", target, weight_format="int4")
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    for fact in (
        "| attention | latent: 4 heads share a cached row of 56 values |",
        "| cache | 0.4 kB a token (float32); keys and values of every head would take 1.6 kB |",
        "| kv_b_proj | int8 row sym |",
    ):
        assert fact in card, fact
    cache = bundle.manifest.cache
    assert (cache["ports"], cache["kv_heads"], cache["head_dim"]) == (["key"], 1, 56)
    assert cache["token_bytes"] == 2 * 56 * 4
    assert cache["expanded_token_bytes"] == 2 * 4 * (18 + 32) * 4


def test_a_cache_of_keys_and_values(bundles: Bundles) -> None:
    bundle = bundles.open("sparse", "aipc")
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "| cache | 0.5 kB a token (float32) |" in card and "kv_b_proj" not in card
    assert bundle.manifest.cache["token_bytes"] == 2 * 2 * 2 * 16 * 4


def test_the_card_is_a_checked_file_of_the_bundle(bundles: Bundles) -> None:
    result = bundles.result("sparse", "ort")
    assert "README.md" in open_bundle(result.folder, check=True).manifest.files

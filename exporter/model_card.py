"""README.md of a bundle, from its manifest."""

from __future__ import annotations

from typing import Any

import jinja2

from cpm_edge.quant import WeightFormat
from cpm_edge.runtimes.manifest import Manifest

TEMPLATE = """\
# {{ m.source.name }} for {{ m.target }}

Made by {{ m.producer }} from the {{ m.source.kind }} checkpoint `{{ m.source.name }}` ({{ m.architecture }}).

| | |
|---|---|
| engine | {{ m.engine.name }} {{ m.engine.requires }} (made with {{ m.engine.version }}) |
| linear layers | {{ linear }} |
| embedding, head | {{ m.weights.embedding }}, {{ m.weights.head }} |
{%- if m.weights.absorbed %}
| kv_b_proj | {{ m.weights.absorbed }} |
{%- endif %}
| attention | {{ attention }} |
{%- if sparsity %}
| MLP sparsity | {{ sparsity }} |
{%- endif %}
| cache | {{ cache }} |
| context | {{ m.context.max_context }} tokens; RoPE: {{ m.context.rope.choice }} |
| layers, hidden size, vocabulary | {{ m.num_layers }}, {{ m.hidden_size }}, {{ m.vocab_size }} |

## Run

```
pip install "cpm-edge[{{ m.target }}]"    # or from a clone: pip install "./cpm-edge[{{ m.target }}]"
cpm-run THIS_FOLDER --prompt "Why is the sky blue?"
```

```python
from cpm_edge.runtimes import load

model = load("THIS_FOLDER")
for piece in model.stream("Why is the sky blue?", max_new_tokens=200):
    print(piece, end="", flush=True)
```
"""


def linear_layers(weights: dict[str, Any]) -> str:
    """What the linear layers are and take, from ``Manifest.weights``.

    For example ``int4 g128 sym as in the checkpoint (GPTQ), 59.7 MB, 28.1% of bf16``.
    """
    stored, share = weights["linear_bytes"], weights["linear_bytes"] / weights["linear_parameters"] / 2
    calibration = weights.get("calibration")
    if calibration and (calibration["method"] != "rtn" or calibration["int8"]):
        four_bits = weights["linear"].startswith(WeightFormat.INT4.value)
        by = "" if four_bits else ", others int4"
        by += f" by {calibration['method']} on {calibration['tokens']} tokens"
        return f"{weights['linear']}{by}, {stored / 1e6:.1f} MB, {share:.1%} of bf16"
    origins = weights.get("taken_from", {})
    named = ", ".join(name for name in origins if name != "ternary")
    taken = " as in the checkpoint" if origins else ""
    taken += f" ({named})" if named else ""
    return f"{weights['linear']}{taken}, {stored / 1e6:.1f} MB, {share:.1%} of bf16"


def cache_cost(cache: dict[str, Any]) -> str:
    """What a token takes in the cache, from ``Manifest.cache``.

    For example ``35.7 kB a token (float16); keys and values of every head would take 793.6 kB``.
    """
    cost = f"{cache['token_bytes'] / 1e3:.1f} kB a token ({cache['dtype']})"
    expanded = cache.get("expanded_token_bytes")
    if expanded is None:
        return cost
    return f"{cost}; keys and values of every head would take {expanded / 1e3:.1f} kB"


def sparsity_of(verification: dict[str, Any] | None) -> str | None:
    """What decode steps of the verification left out of the MLPs, from ``Manifest.verification``.

    For example ``88.1% of neurons inactive in 16 decoded tokens, 15.2% of up and down projections read``.
    None where all is read, or nothing was verified.
    """
    if verification is None or verification["mlp_sparsity"] is None:
        return None
    shares, tokens = verification["mlp_sparsity"], verification["decoded"]
    return (
        f"{shares['inactive_share']:.1%} of neurons inactive in {tokens} decoded tokens, "
        f"{shares['read_share']:.1%} of up and down projections read"
    )


def model_card(manifest: Manifest) -> str:
    """Markdown for the folder's front page."""
    spec = manifest.attention
    attention = "dense"
    if spec.get("v_head_size"):
        attention = f"latent: {spec['num_heads']} heads share a cached row of {spec['head_dim']} values"
    if spec["sparse"]:
        attention = (
            f"InfLLM-V2 sparse from {spec['dense_len']} tokens on: {spec['topk']} blocks of "
            f"{spec['block_size']} tokens and a window of {spec['window_size']}"
        )
    recurrent = manifest.cache.get("recurrent")
    if recurrent:
        with_cache = manifest.num_layers - len(recurrent["layers"])
        attention += f" in {with_cache} of {manifest.num_layers} layers"
        attention += ", linear with a state of fixed size in the others"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        m=manifest,
        attention=attention,
        linear=linear_layers(manifest.weights),
        cache=cache_cost(manifest.cache),
        sparsity=sparsity_of(manifest.verification),
    )

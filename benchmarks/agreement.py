"""Greedy tokens of every runtime against the traced modules on the weights that the bundles hold.

Runs the eager modules on the dequantized weights, our two runtimes, openvino_genai's LLMPipeline and
onnxruntime_genai. A difference counts as a tie when the eager top-2 margin is below 1e-2. The native flavour
rounds activations to int8 and moves logits further: there a difference must be at a margin smaller than what
the same rounding does to the margins of other steps.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from cpm_edge.benchmarks.report import Report
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.eager import build_model, empty_caches, load_weights
from cpm_edge.exporter.export import export, prepare
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.runtimes import load
from cpm_edge.runtimes.model import Model

MARGIN = 1e-2
PROMPT = "Write a short story about a lighthouse keeper and her dog."


@dataclass(frozen=True)
class Greedy:
    """Tokens and, where known, the second best one of each step and the gap between their logits."""

    tokens: list[int]
    margins: list[float]
    seconds: list[int] = field(default_factory=list)


@torch.no_grad()
def eager_greedy(options: ExportOptions, prompt: Sequence[int], count: int) -> Greedy:
    """Greedy continuation by the modules, with the weights as the bundle stores them."""
    with open_checkpoint(options.model) as checkpoint:
        plan = prepare(options, checkpoint)
        rope = plan.config.rope.table(plan.max_context)
        shapes = {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
        shapes["rotary.inv_freq"] = rope.inv_freq.shape
        weights = ModelWeights(checkpoint, shapes, {"rotary.inv_freq": rope.inv_freq}, plan.policy)
        model = build_model(plan.architecture.model_class(), plan.config, rope)
        load_weights(model, "", weights.dequantized, plan.config.tie_word_embeddings)
    caches = empty_caches(plan.config, len(prompt) + count)
    tokens: list[int] = []
    margins: list[float] = []
    seconds: list[int] = []
    step, past = list(prompt), 0
    for _ in range(count):
        logits, caches = model(torch.tensor([step]), torch.tensor([past]), caches)
        best = torch.topk(logits[0, -1], 2)
        tokens.append(int(best.indices[0]))
        seconds.append(int(best.indices[1]))
        margins.append(float(best.values[0] - best.values[1]))
        past += len(step)
        step = tokens[-1:]
    return Greedy(tokens, margins, seconds)


def session_greedy(model: Model, prompt: Sequence[int], count: int) -> Greedy:
    """Greedy continuation by our runtime."""
    tokens: list[int] = []
    with model.session() as session:
        logits = session.forward(list(prompt))
        for _ in range(count):
            tokens.append(int(logits.argmax()))
            logits = session.forward(tokens[-1:])
    return Greedy(tokens, [])


def followed(model: Model, prompt: Sequence[int], reference: Greedy) -> Greedy:
    """Our runtime's best tokens on the reference's text, and its margins of the reference's two best."""
    tokens: list[int] = []
    margins: list[float] = []
    with model.session() as session:
        logits = session.forward(list(prompt))
        for best, second in zip(reference.tokens, reference.seconds, strict=True):
            tokens.append(int(logits.argmax()))
            margins.append(float(logits.flat[best] - logits.flat[second]))
            logits = session.forward([best])
    return Greedy(tokens, margins)


def rounding_verdict(reference: Greedy, other: Greedy) -> tuple[str, bool]:
    """The same for a runtime that rounds more than the reference, and followed its text (``followed``)."""
    same = [a == b for a, b in zip(reference.tokens, other.tokens, strict=True)]
    moved = [abs(a - b) for a, b in zip(reference.margins, other.margins, strict=True)]
    if all(same):
        return f"the same {len(same)} tokens; margins move by up to {max(moved):.2f}", True
    first = same.index(False)
    widest = max(margin for margin, equal in zip(reference.margins, same, strict=True) if not equal)
    usual = max((move for move, equal in zip(moved, same, strict=True) if equal), default=0.0)
    text = (
        f"first differs at token {first}, {sum(same)} of {len(same)} the same on the eager text: "
        f"eager top-2 margin {widest:.2f} or less there; those of other tokens move by up to {usual:.2f}"
    )
    return text, widest < usual


def openvino_genai_greedy(bundle: Path, prompt: Sequence[int], count: int) -> Greedy:
    """Greedy continuation by LLMPipeline on the unchanged folder."""
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(bundle), "CPU", ATTENTION_BACKEND="SDPA")
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
    result = pipeline.generate(ov.Tensor(np.array([prompt], np.int64)), config)
    return Greedy([int(token) for token in result.tokens[0]], [])


def onnxruntime_genai_greedy(bundle: Path, prompt: Sequence[int], count: int) -> Greedy:
    """Greedy continuation by onnxruntime_genai on the unchanged folder."""
    import onnxruntime_genai as genai

    model = genai.Model(str(bundle))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    tokens: list[int] = []
    while not generator.is_done() and len(tokens) < count:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return Greedy(tokens, [])


def fused_attention(bundle: Path) -> tuple[int, int]:
    """(fused stateful SDPA nodes in the compiled model, decoder layers)."""
    import openvino as ov

    compiled = ov.Core().compile_model(str(bundle / "openvino_model.xml"), "CPU")
    kinds = [str(op.get_rt_info()["layerType"].value) for op in compiled.get_runtime_model().get_ops()]
    layers = json.loads((bundle / "cpm_edge.json").read_text())["num_layers"]
    return sum("ScaledDotProductAttention" in kind for kind in kinds), int(layers)


def verdict(reference: Greedy, other: Greedy) -> tuple[str, bool]:
    """What a comparison shows, and whether it holds."""
    for index, (expected, got) in enumerate(zip(reference.tokens, other.tokens, strict=False)):
        if expected != got:
            margin = reference.margins[index] if reference.margins else float("nan")
            return f"differs at token {index}: eager top-2 margin {margin:.4f}", margin < MARGIN
    if len(other.tokens) < len(reference.tokens):
        return f"only {len(other.tokens)} tokens, all the same", False
    return f"the same {len(reference.tokens)} tokens", True


def run(model: str, tokens: int, weight_format: str, prompt: str) -> Report:
    """One line a runtime; ``results["holds"]`` is false when one of them disagrees beyond a tie.

    Args:
        model: the checkpoint.
        tokens: how many to generate.
    """
    settings = {"model": model, "tokens": tokens, "weight_format": weight_format, "prompt": prompt}
    report = Report("agreement", settings)
    rows: list[dict[str, Any]] = []

    def row(name: str, against: str, result: tuple[str, bool]) -> None:
        rows.append({"runtime": name, "against": against, "result": result[0], "holds": result[1]})

    with tempfile.TemporaryDirectory() as folder:
        reference: Greedy | None = None
        others: dict[str, Any] = {"aipc": openvino_genai_greedy, "ort": onnxruntime_genai_greedy}
        for target, foreign in others.items():
            options = ExportOptions(
                model=model,
                target=target,
                output=Path(folder) / target,
                weight_format=weight_format,
                activations="fp32",
                verify=False,
            )
            export(options, Progress())
            runtime = load(options.output)
            ids = runtime.encode(runtime.render([{"role": "user", "content": prompt}]))
            reference = reference or eager_greedy(options, ids, tokens)
            ours = session_greedy(runtime, ids, tokens)
            row(f"cpm_edge {target}", "eager, dequantized weights", verdict(reference, ours))
            named = Greedy(ours.tokens, reference.margins)
            row(foreign.__name__.removesuffix("_greedy"), f"cpm_edge {target}",
                verdict(named, foreign(options.output, ids, tokens)))  # fmt: skip
            text = runtime.decode(ours.tokens)
            runtime.close()
            if target == "aipc":
                fused, layers = fused_attention(options.output)
                row("openvino runtime model", "decoder layers",
                    (f"{fused} fused stateful SDPA of {layers}", fused == layers))  # fmt: skip
        assert reference is not None
        options = ExportOptions(
            model=model, target="aipc", output=Path(folder) / "native", weight_format=weight_format,
            flavour="native", verify=False,
        )  # fmt: skip
        export(options, Progress())
        with load(options.output) as runtime:
            row("cpm_edge aipc native", "eager, dequantized weights",
                rounding_verdict(reference, followed(runtime, ids, reference)))  # fmt: skip
    table = Table("runtime", "against", "result")
    for each in rows:
        table.add_row(each["runtime"], each["against"], each["result"])
    report.tables.append(table)
    report.notes.append(f"text: {text}")
    report.results = {"rows": rows, "text": text, "holds": all(each["holds"] for each in rows)}
    return report

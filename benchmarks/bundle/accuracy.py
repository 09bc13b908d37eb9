"""``cpm-bench accuracy``: what a bundle's weights and engine cost in quality, on a text.

The reference is the checkpoint itself: our modules on its own weights in float32, one layer in memory at a
time. Windows of the text are scored from an empty context, as ``cpm-bench perplexity`` does; KL divergence
and agreement are over every row of every window. Greedy text: the bundle continues the start of each window,
and one pass of the reference over prompt and continuation tells where it would first have gone elsewhere. The
checkpoint is read twice, whatever the number of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from cpm_edge.benchmarks.bundle.accuracy_file import scored_bundle
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.perplexity import cut_windows, negative_log_likelihood
from cpm_edge.benchmarks.report import Report
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.configs import MiniCPMConfig
from cpm_edge.exporter.eager import run_all_streamed
from cpm_edge.exporter.progress import Progress
from cpm_edge.exporter.registry import find_architecture
from cpm_edge.exporter.verify import compare
from cpm_edge.runtimes import load
from cpm_edge.runtimes.bundle import open_bundle
from cpm_edge.runtimes.manifest import Manifest
from cpm_edge.runtimes.model import Model
from cpm_edge.runtimes.session import Session

FloatArray = npt.NDArray[np.float32]
Reference = Callable[[Sequence[Sequence[int]]], Iterator[FloatArray]]


@dataclass(frozen=True)
class Settings:
    """What is scored.

    Attributes:
        characters: where in the text to begin and to end.
        window: tokens that are scored from an empty context; ``windows`` of them.
        prompt: tokens of a window that the bundle continues by ``new_tokens``.
    """

    characters: tuple[int, int] = (20_000, 60_000)
    window: int = 512
    windows: int = 4
    prompt: int = 64
    new_tokens: int = 64


def run(bundle: Path, reference: str, text: Path, settings: Settings) -> Report:
    """Score one bundle against its checkpoint.

    Raises:
        BenchError: the text is too short, or the checkpoint is of another model.
    """
    manifest = open_bundle(bundle).manifest
    if settings.window > manifest.context.max_context:
        raise BenchError(
            f"--window: expected at most {manifest.context.max_context} tokens, the bundle's context, "
            f"got {settings.window}"
        )
    with load(bundle) as model, Progress().stage("Scoring the bundle and its checkpoint"):
        windows = cut_windows(model, text, settings.characters, settings.window, settings.windows)
        results = score(model, reference_of(manifest, reference), list(windows), settings)
        results["bundle"] = scored_bundle(manifest)
    results |= {"reference": Path(reference).name, "text": text.name}
    report = Report("accuracy", {**vars(settings), "bundle": str(bundle), "text": str(text)}, results)
    report.tables.append(_table(results, bundle.resolve().name))
    return report


def reference_of(manifest: Manifest, reference: str) -> Reference:
    """Logits (T, vocab) from the checkpoint's own weights, with the bundle's attention and RoPE."""

    def logits(sequences: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        with open_checkpoint(reference) as checkpoint:
            architecture = find_architecture(checkpoint.config)
            config = architecture.config.from_dict(checkpoint.config)
            if isinstance(config, MiniCPMConfig):
                config = config.with_attention("sparse" if manifest.attention["sparse"] else "dense")
            sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers)
            expected = (manifest.vocab_size, manifest.hidden_size, manifest.num_layers)
            if sizes != expected:
                raise BenchError(
                    f"--reference: expected vocabulary, hidden size and layers {expected}, got {sizes}",
                    hint="pass the checkpoint that the bundle was exported from",
                )
            rope = config.rope.table(manifest.context.max_context)
            frequencies = {"rotary.inv_freq": np.asarray(rope.inv_freq)}

            def read(name: str) -> FloatArray:
                return frequencies[name] if name in frequencies else checkpoint.read(name)

            for run in run_all_streamed(architecture.model_class(), config, rope, read, sequences):
                yield run.logits

    return logits


def score(
    model: Model, reference: Reference, windows: Sequence[npt.NDArray[np.int64]], settings: Settings
) -> dict[str, Any]:
    """Perplexities, divergence and agreement over windows, and greedy text."""
    ours = theirs = kl = top1 = 0.0
    with model.session() as session:
        for window, expected in zip(windows, reference([w.tolist() for w in windows]), strict=True):
            session.reset()
            got = session.forward(window, logits="all")
            ours += negative_log_likelihood(got[:-1], window[1:])
            theirs += negative_log_likelihood(expected[:-1], window[1:])
            found = compare(expected, got)
            kl, top1 = kl + found["kl"], top1 + found["top1"]
        divergences = _divergences(session, reference, windows, settings)
    count = sum(len(window) - 1 for window in windows)
    return {
        "perplexity": float(np.exp(ours / count)),
        "reference_perplexity": float(np.exp(theirs / count)),
        "kl": kl / len(windows),
        "top1": top1 / len(windows),
        "tokens": sum(map(len, windows)),
        "greedy": {"first_divergence": divergences, "summary": summary(divergences, settings.new_tokens)},
    }


def _divergences(
    session: Session, reference: Reference, windows: Sequence[npt.NDArray[np.int64]], settings: Settings
) -> list[int | None]:
    """Of each window, the bundle's first greedy token that the reference would not have chosen."""
    prompts = [window[: settings.prompt].tolist() for window in windows]
    texts = [_continued(session, prompt, settings.new_tokens) for prompt in prompts]
    sequences = [prompt + text[:-1] for prompt, text in zip(prompts, texts, strict=True)]
    places: list[int | None] = []
    for text, logits in zip(texts, reference(sequences), strict=True):
        differing = np.nonzero(logits[-len(text) :].argmax(1) != np.array(text))[0]
        places.append(int(differing[0]) if len(differing) else None)
    return places


def _continued(session: Session, prompt: list[int], new_tokens: int) -> list[int]:
    session.reset()
    tokens = [int(session.forward(prompt).argmax())]
    while len(tokens) < new_tokens:
        tokens.append(int(session.forward(tokens[-1:]).argmax()))
    return tokens


def summary(divergences: Sequence[int | None], new_tokens: int) -> str:
    """In words: where greedy continuations part."""
    same = sum(each is None for each in divergences)
    text = f"{same} of {len(divergences)} continuations of {new_tokens} tokens are the same"
    places = sorted(each for each in divergences if each is not None)
    return f"{text}, the others part at token {', '.join(map(str, places))}" if places else text


def _table(results: dict[str, Any], name: str) -> Table:
    table = Table("", name, "reference", title=f"{results['tokens']} tokens of {results['text']}")
    table.add_row("perplexity", f"{results['perplexity']:.3f}", f"{results['reference_perplexity']:.3f}")
    table.add_row("KL divergence, nats a token", f"{results['kl']:.4f}", "0")
    table.add_row("same best token", f"{results['top1']:.1%}", "")
    table.add_row("greedy text", results["greedy"]["summary"], "")
    return table

"""A checkpoint of a real model's shape with random bf16 weights, for measuring exports and engines.

    python -m cpm_edge.benchmarks.random_checkpoint --shape minicpm4-0.5b -o /tmp/minicpm4-0.5b

Values come from one block of normal numbers, taken at another offset for each tensor: drawing billions of
them would take longer than what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import tokenizers
import torch
from safetensors.torch import save_file

from cpm_edge.exporter.eager import build_model
from cpm_edge.exporter.registry import find_architecture

SHAPES = Path(__file__).parent / "shapes"
SHARD_BYTES = 2 << 30
BLOCK = 1 << 22
STD = 0.02
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def shape_names() -> list[str]:
    """The shapes that come with the benchmarks."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def write_checkpoint(shape: str, folder: Path, layers: int | None = None) -> None:
    """Write config, sharded weights and a byte tokenizer.

    Args:
        shape: one of ``shape_names()``.
        folder: made when missing.
        layers: fewer decoder layers than the model has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((SHAPES / f"{shape}.json").read_text())
    if layers:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_weights(config, folder)
    _write_tokenizer(config["vocab_size"], folder)


def _write_weights(config: dict[str, object], folder: Path) -> None:
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = size = 0
    for name, tensor in _tensors(config):
        shard[name] = tensor
        size += tensor.numel() * 2
        if size >= SHARD_BYTES:
            number, size = _save(shard, folder, number, index), 0
    if shard:
        _save(shard, folder, number, index)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _save(shard: dict[str, torch.Tensor], folder: Path, number: int, index: dict[str, str]) -> int:
    file = f"model-{number:05}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    index.update(dict.fromkeys(shard, file))
    shard.clear()
    return number + 1


def _tensors(config: dict[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    architecture = find_architecture(config)
    parsed = architecture.config.from_dict(config)
    model = build_model(architecture.model_class(), parsed, parsed.rope.table(parsed.max_context))
    values = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * STD).bfloat16()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            continue
        rolled = values.roll(number * 7919)
        repeats = -(-parameter.numel() // BLOCK)
        yield name, rolled.repeat(repeats)[: parameter.numel()].view(parameter.shape).contiguous()


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    """One token a byte, the rest of the vocabulary filled with words that no text contains."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *alphabet]
    names += [f"<|{number}|>" for number in range(len(names), vocab_size)]
    model = tokenizers.models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


@click.command()
@click.option("--shape", required=True, type=click.Choice(shape_names()))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), help="Fewer decoder layers.")
def main(shape: str, output: Path, layers: int | None) -> None:
    """Write a checkpoint with random weights."""
    write_checkpoint(shape, output, layers)


if __name__ == "__main__":
    main()

"""A checkpoint of a real model's shape with random bf16 weights, for measuring exports and engines.

Values come from one block of random numbers, taken at another offset for each tensor: drawing billions of
them would take longer than what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.eager import build_model
from cpm_edge.exporter.registry import find_architecture
from cpm_edge.exporter.weights import EMBEDDING, HEAD

SHARD_BYTES = 2 << 30
BLOCK = 1 << 22
STD = 0.02
TERNARY_GROUP = 128
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_checkpoint(shape: Shape, folder: Path, *, ternary: bool = False) -> None:
    """Write config, sharded weights and a byte tokenizer.

    Args:
        folder: made when missing.
        ternary: linear layers hold -1, 0 and 1 times one bf16 scale for each 128 columns.

    Raises:
        BenchError: ternary, and a linear layer whose columns 128 does not divide.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=1), encoding="utf-8")
    _write_weights(shape.config, folder, ternary)
    _write_tokenizer(shape.vocab_size, folder)


def _write_weights(config: dict[str, Any], folder: Path, ternary: bool) -> None:
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = size = 0
    for name, tensor in _tensors(config, ternary):
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


def _tensors(config: dict[str, Any], ternary: bool) -> Iterator[tuple[str, torch.Tensor]]:
    architecture = find_architecture(config)
    parsed = architecture.config.from_dict(config)
    model = build_model(architecture.model_class(), parsed, parsed.rope.table(parsed.max_context))
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(BLOCK, generator=generator) * STD).bfloat16()
    codes = torch.randint(-1, 2, (BLOCK,), generator=generator).bfloat16()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
        elif ternary and name not in (EMBEDDING, HEAD):
            yield name, _ternary(name, parameter.shape, codes, number)
        else:
            yield name, _filled(values, parameter.shape, number)


def _filled(block: torch.Tensor, shape: torch.Size, number: int) -> torch.Tensor:
    count = shape.numel()
    rolled = block.roll(number * 7919)
    return rolled.repeat(-(-count // len(block)))[:count].view(shape).contiguous()


def _ternary(name: str, shape: torch.Size, codes: torch.Tensor, number: int) -> torch.Tensor:
    rows, cols = shape
    if cols % TERNARY_GROUP:
        raise BenchError(
            f"{name}: ternary weights need a multiple of {TERNARY_GROUP} columns, the shape has {cols}"
        )
    groups = (rows, cols // TERNARY_GROUP)
    scales = STD * (0.5 + torch.rand(groups, generator=torch.Generator().manual_seed(number)))
    filled = _filled(codes, shape, number).view(*groups, TERNARY_GROUP)
    return (filled * scales.bfloat16()[..., None]).view(shape)


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

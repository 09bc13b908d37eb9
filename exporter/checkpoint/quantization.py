"""What config.json says about quantized weights: GPTQ and AWQ are read, anything else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpm_edge.exporter.checkpoint.files import read_json_object
from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.errors import ConfigError

KEY = "quantization_config"
# Files of AutoGPTQ and AutoAWQ from before config.json had the key, with the method they mean.
OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
METHODS = {"gptq": "gptq", "gptq_marlin": "gptq", "marlin": "gptq", "awq": "awq", "awq_marlin": "awq"}
WAY_OUT = "export the unquantized checkpoint and choose --weight-format int4"

# How the weights were calibrated or are to be run elsewhere: nothing that changes what is stored.
INFORMATION = (
    "act_group_aware",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "hyb_act",
    "is_marlin_format",
    "lm_head",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "modules_to_fuse",
    "modules_to_not_convert",
    "mse",
    "offload_to_disk",
    "offload_to_disk_path",
    "pack_impl",
    "pad_token_id",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
    "v2",
    "v2_alpha",
)


@dataclass(frozen=True)
class Quantization:
    """How the packed tensors of a checkpoint are to be read.

    Attributes:
        method: ``gptq`` or ``awq``.
        less_one: zero points are stored less 1 (GPTQ's first format).
        group_sizes: columns that may share a scale; -1 is the whole row.
        symmetric: every zero point must be 8; False if any may occur.
    """

    method: str
    less_one: bool
    group_sizes: frozenset[int]
    symmetric: bool


def read_quantization(config: Mapping[str, Any], folder: Path) -> Quantization | None:
    """The quantization of a checkpoint folder, None if it has none.

    Raises:
        ConfigError: another method, another number of bits, a key or value that is not known.
        CheckpointError: an older file beside config.json cannot be read.
    """
    section, method = config.get(KEY), ""
    if section is None:
        name = next((name for name in OLDER_FILES if (folder / name).is_file()), None)
        if name is None:
            return None
        section, method = read_json_object(folder / name), OLDER_FILES[name]
        reader = ConfigReader(section, name)
    else:
        reader = ConfigReader(section, KEY)
    method = reader.get("quant_method", str, method or "unknown")
    if method not in METHODS:
        raise ConfigError(
            f"{reader.name('quant_method')}: expected gptq or awq with 4 bits, got {method}", hint=WAY_OUT
        )
    try:
        found = (_gptq if METHODS[method] == "gptq" else _awq)(reader)
        reader.only("pack_dtype", ("int32",), "int32")
        for key in ("rotation", "adapter"):
            reader.only(key, (None,), None)
    except ConfigError as error:
        raise ConfigError(error.message, hint=WAY_OUT) from error
    reader.skip("quant_method", "method", *INFORMATION)
    try:
        reader.finish(strict=True)
    except ConfigError as error:
        hint = f"delete them there if they only tell how the weights were calibrated; else {WAY_OUT}"
        raise ConfigError(error.message, hint=hint) from error
    return found


def _gptq(reader: ConfigReader) -> Quantization:
    reader.only("bits", (4,))
    kept = reader.get("checkpoint_format", str, None) or reader.get("format", str, "gptq")
    reader.skip("format", "desc_act", "version")
    if kept not in ("gptq", "gptq_v2", "marlin"):
        raise ConfigError(f"{reader.name('checkpoint_format')}: expected gptq, gptq_v2 or marlin, got {kept}")
    sizes, symmetric = {_group_size(reader)}, reader.get("sym", bool, True)
    # Which modules an entry means is seen in the tensors themselves; here it only widens what they may be.
    for entry in reader.get("dynamic", dict, {}).values():
        if isinstance(entry, dict):
            sizes.add(entry.get("group_size", next(iter(sizes))))
            symmetric = symmetric and entry.get("sym", True) is True
    return Quantization("gptq", kept == "gptq", frozenset(sizes), symmetric)


def _awq(reader: ConfigReader) -> Quantization:
    reader.only("w_bit" if reader.has("w_bit") else "bits", (4,))
    version = (reader.get("version", str, None) or reader.get("checkpoint_format", str, "gemm")).lower()
    reader.skip("checkpoint_format", "format", "desc_act", "sym", "zero_point", "dynamic")
    if version not in ("gemm", "marlin"):
        raise ConfigError(f"{reader.name('version')}: expected gemm or marlin, got {version}")
    return Quantization("awq", False, frozenset({_group_size(reader)}), symmetric=False)


def _group_size(reader: ConfigReader) -> int:
    key = "q_group_size" if reader.has("q_group_size") else "group_size"
    size = reader.get(key, int, 128)
    if size != -1 and (size < 32 or size % 32):
        raise ConfigError(f"{reader.name(key)}: expected -1 or a multiple of 32, got {size}")
    return size

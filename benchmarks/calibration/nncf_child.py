"""Compresses an OpenVINO language model with NNCF and runs it on token windows; run by path, in NNCF's venv.

    python nncf_child.py '{"model": "openvino_model.xml", "windows": "windows.npy", "group_size": 64,
                           "sequences": "sequences.npy", "output": "FOLDER"}'

Without "sequences" weights are rounded to nearest, with them calibrated by all that NNCF has for int4: AWQ,
scale estimation and GPTQ together. Writes the logits of window N to FOLDER/N.npy, then prints a JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov

# As exact as the CPU plugin computes: the weights are what is compared.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


def inputs_of(model: Any, tokens: Any) -> dict[str, Any]:
    """What a model reads for a prompt (T,) from an empty state."""
    count = len(tokens)
    values = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return {name: values[name] for port in model.inputs for name in port.get_names() if name in values}


def compressed(model: Any, group_size: int, sequences: Any) -> Any:
    """The model with symmetric int4 in every linear layer; embedding and head stay as they are."""
    options: dict[str, Any] = {
        "mode": nncf.CompressWeightsMode.INT4_SYM,
        "group_size": group_size,
        "ratio": 1.0,
        "backup_mode": nncf.BackupMode.NONE,
    }
    if sequences is not None:
        dataset = nncf.Dataset([inputs_of(model, tokens) for tokens in sequences])
        options |= {"dataset": dataset, "subset_size": len(sequences)}
        options |= {"awq": True, "scale_estimation": True, "gptq": True}
    return nncf.compress_weights(model, **options)


def write_logits(model: Any, windows: Any, output: Path) -> None:
    """Logits (T, vocab) of every window, float32, each from an empty state."""
    request = ov.Core().compile_model(model, "CPU", EXACT).create_infer_request()
    for number, tokens in enumerate(windows):
        request.reset_state()
        result = request.infer(inputs_of(model, tokens))
        np.save(output / f"{number}.npy", np.asarray(result["logits"], np.float32)[0])


def main() -> None:
    settings = json.loads(sys.argv[1])
    model = ov.Core().read_model(settings["model"])
    sequences = np.load(settings["sequences"]) if settings.get("sequences") else None
    start = time.perf_counter()
    model = compressed(model, settings["group_size"], sequences)
    seconds = time.perf_counter() - start
    write_logits(model, np.load(settings["windows"]), Path(settings["output"]))
    narrow = sum(
        op.get_type_name() == "Constant" and op.get_element_type().bitwidth == 4 for op in model.get_ops()
    )
    print(json.dumps({"version": nncf.__version__, "int4_matrices": narrow, "seconds": seconds}))


if __name__ == "__main__":
    main()

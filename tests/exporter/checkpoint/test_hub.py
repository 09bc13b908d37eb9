"""Downloads against a local server; each in a process of its own, since the client reads its
environment at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.exporter.checkpoint.builders import CONFIG
from tests.exporter.checkpoint.fake_hub import COMMIT, FakeHub, fake_hub

SCRIPT = """
import json, sys
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.errors import CheckpointError
results = []
for ref, revision in json.loads(sys.argv[1]):
    try:
        with open_checkpoint(ref, revision=revision) as checkpoint:
            result = {"name": checkpoint.name, "kind": checkpoint.kind, "assets": sorted(checkpoint.assets())}
            result["tensors"] = {name: checkpoint.read(name).tolist() for name in checkpoint.tensors}
            results.append(result)
    except CheckpointError as error:
        results.append({"message": error.message, "hint": error.hint})
print(json.dumps(results))
"""
WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
METADATA = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "modeling_minicpm.py": b"raise SystemExit",
    "README.md": b"# model",
}
SHARD_INDEX = json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}).encode()
REPOS = {
    "org/plain": METADATA
    | {"model.safetensors": save({"w": WEIGHT}), "pytorch_model.bin": b"x", "consolidated.safetensors": b"x"},
    "org/sharded": METADATA
    | {
        "model.safetensors.index.json": SHARD_INDEX,
        "model-00001-of-00001.safetensors": save({"w": WEIGHT}),
    },
    "org/gptq": METADATA | {"gptq_model-4bit-128g.safetensors": save({"w": WEIGHT})},
    "org/gguf": {"model-Q4_0.gguf": b"GGUF", "README.md": b"# files"},
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub(REPOS) as server:
        yield server


class Client:
    """Opens references in a new process with a hub cache of its own."""

    def __init__(self, cache: Path, url: str) -> None:
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))
        } | {"HF_HOME": str(cache), "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        self.stderr = ""

    def open(self, *refs: str | tuple[str, str | None], **environment: str) -> list[dict[str, Any]]:
        pairs = [ref if isinstance(ref, tuple) else (ref, None) for ref in refs]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(pairs)],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        return list(json.loads(done.stdout))


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    return Client(tmp_path / "cache", hub.url)


def test_only_the_files_needed_are_fetched_and_the_cache_serves_offline(hub: FakeHub, client: Client) -> None:
    (opened,) = client.open("org/plain")
    assert opened == {
        "name": "org/plain",
        "kind": "safetensors",
        "tensors": {"w": WEIGHT.tolist()},
        "assets": ["tokenizer.json", "tokenizer_config.json"],
    }
    assert client.stderr == ""  # no progress bar: stderr is no terminal
    assert hub.fetched() == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}

    before = len(hub.requests)
    assert client.open("org/plain", HF_HUB_OFFLINE="1") == [opened]
    assert len(hub.requests) == before


def test_shards_other_names_and_revisions(hub: FakeHub, client: Client) -> None:
    for opened in client.open("org/sharded", "org/gptq", ("org/plain", COMMIT)):
        assert opened["tensors"] == {"w": WEIGHT.tolist()}
    assert "model-00001-of-00001.safetensors" in hub.fetched()
    assert not any(name.endswith(".py") for name in hub.fetched())


def test_a_token_opens_a_private_repository(hub: FakeHub, client: Client) -> None:
    hub.tokens["org/plain"] = "hf_secret"
    (refused,) = client.open("org/plain")
    assert "org/plain: no such repository" in refused["message"]
    assert "HF_TOKEN" in refused["hint"]
    (opened,) = client.open("org/plain", HF_TOKEN="hf_secret")
    assert opened["kind"] == "safetensors"
    assert hub.requests[-1][1] == "Bearer hf_secret"


def test_errors_say_what_to_do(hub: FakeHub, client: Client) -> None:
    hub.gated.add("org/sharded")
    missing, gated, revision, gguf, invalid = client.open(
        "org/missing", "org/sharded", ("org/plain", "no-such-branch"), "org/gguf", "org/a..b"
    )
    assert f"no such repository at {hub.url}" in missing["message"] and "spelling" in missing["hint"]
    assert "access is restricted" in gated["message"] and "accept the terms" in gated["hint"]
    assert "no-such-branch): no such branch" in revision["message"]
    assert "holds no safetensors" in gguf["message"] and "FILE.gguf" in gguf["hint"]
    assert "not a Hugging Face id" in invalid["message"]


def test_offline_without_cache_and_without_network(client: Client) -> None:
    (offline,) = client.open("org/plain", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline["message"] and "unset HF_HUB_OFFLINE" in offline["hint"]
    (unreachable,) = client.open("org/plain", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in unreachable["message"]
    assert "HF_ENDPOINT" in unreachable["hint"]

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.runtimes.manifest import checksum
from tests.bad_input.bench import QUESTION, Bench

MANIFEST = "cpm_edge.json"
DIGEST = "0" * 64


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest so that only the change itself can be noticed."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    manifest["checksum"] = checksum(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "README.md"])
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_flipped_byte(bench: Bench, bundle: Path, name: str, opened_before: bool) -> None:
    if opened_before:
        assert bench.run(bundle).exit_code == 0
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    bench.run_fails(bundle).says(
        f"{name} is damaged", "expected SHA-256", "got", hint="Copy the bundle again"
    )


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_missing_file(bench: Bench, bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    bench.run_fails(bundle).says(f"{name} is missing", hint="Copy the bundle again")


def test_a_truncated_file(bench: Bench, bundle: Path) -> None:
    data = (bundle / "model.onnx.data").read_bytes()
    (bundle / "model.onnx.data").write_bytes(data[:-1])
    bench.run_fails(bundle).says(
        "model.onnx.data", f"expected {len(data)} bytes, got {len(data) - 1}", hint="copy"
    )


def test_a_newer_format(bench: Bench, bundle: Path) -> None:
    rewrite(bundle, lambda manifest: manifest.update(format_version=2))
    bench.run_fails(bundle).says("format version 2", "reads up to 1", hint="pip install --upgrade cpm-edge")


@pytest.mark.parametrize(
    "name", ["../secret.txt", "/etc/hostname", "a/../../secret.txt", "C:/x", "..\\secret.txt"]
)
def test_a_path_that_leaves_the_bundle(bench: Bench, bundle: Path, name: str) -> None:
    (bench.root / "secret.txt").write_text("secret")
    rewrite(bundle, lambda manifest: manifest["files"].update({name: {"sha256": DIGEST, "bytes": 6}}))
    bench.run_fails(bundle).says(f"files[{name!r}]", "inside the bundle", hint="Do not use this bundle")


def test_a_link_that_leaves_the_bundle(bench: Bench, bundle: Path) -> None:
    shutil.move(bundle / "tokenizer.json", bench.root / "elsewhere.json")
    (bundle / "tokenizer.json").symlink_to(bench.root / "elsewhere.json")
    bench.run_fails(bundle).says("tokenizer.json", "leaves the bundle", hint="Do not use this bundle")


def test_a_file_that_is_not_listed_is_not_used(bench: Bench, bundle: Path) -> None:
    rewrite(bundle, lambda manifest: manifest["files"].pop("tokenizer.json"))
    bench.run_fails(bundle).says("has no tokenizer.json", hint="Export the bundle again")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"format_version": "1"}', '{"format_version": 0}']
)
def test_a_damaged_manifest(bench: Bench, bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    bench.run_fails(bundle).says(MANIFEST, hint="again")


def test_a_manifest_that_cannot_be_read(bench: Bench, bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).mkdir()
    bench.run_fails(bundle).says("Is a directory", MANIFEST, hint="permissions")


def test_an_engine_that_is_too_old(bench: Bench, bundle: Path) -> None:
    rewrite(bundle, lambda manifest: manifest["engine"].update(requires=">=99"))
    bench.run_fails(bundle).says("onnxruntime", "expected version >=99", "got 1.", hint="pip install")


def test_a_target_without_engine(bench: Bench, bundle: Path) -> None:
    rewrite(bundle, lambda manifest: manifest.update(target="toaster"))
    bench.run_fails(bundle).says(
        "target: expected one of aipc, jetson, ort, rtx", "'toaster'", hint="another --target"
    )


def test_no_bundle(bench: Bench) -> None:
    bench.run_fails(bench.root / "nowhere").says("no bundle folder", "nowhere", hint="cpm-export")
    bench.run_fails(bench.checkpoint).says("is not a bundle", MANIFEST, hint="cpm-export")


def test_a_model_that_the_engine_refuses(bench: Bench, bundle: Path) -> None:
    """A manifest that vouches for nonsense: the hashes are right, the model is none."""
    import hashlib

    (bundle / "model.onnx").write_bytes(b"nonsense")
    entry = {"sha256": hashlib.sha256(b"nonsense").hexdigest(), "bytes": 8}
    rewrite(bundle, lambda manifest: manifest["files"].update({"model.onnx": entry}))
    bench.run_fails(bundle, *QUESTION).says("onnxruntime cannot load model.onnx", hint="")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"layers": 3', '"dayers": 3'), ('"num_heads": 4', '"num_heads": 5'), ("float32", "float33")],
)
def test_a_flipped_byte_in_the_manifest(bench: Bench, bundle: Path, old: str, new: str) -> None:
    text = (bundle / MANIFEST).read_text()
    assert old in text
    (bundle / MANIFEST).write_text(text.replace(old, new, 1))
    bench.run_fails(bundle).says(MANIFEST, "changed or damaged", hint="again")

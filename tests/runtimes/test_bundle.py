from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.runtimes import bundle as bundle_module
from cpm_edge.runtimes.bundle import MANIFEST, Manifest, check_engine, hash_files, open_bundle
from cpm_edge.runtimes.errors import BackendError, BundleError
from cpm_edge.runtimes.manifest import checksum
from tests.runtimes.fakes import make_bundle, manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read for a hash."""
    names: list[str] = []
    real = bundle_module._sha256

    def spy(path: Path, advance: Any) -> str:
        names.append(path.name)
        return real(path, advance)

    monkeypatch.setattr(bundle_module, "_sha256", spy)
    return names


def edit(folder: Path, change: Any) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    data["checksum"] = checksum(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_manifest_survives_json() -> None:
    original = manifest(
        {}, flavour="stock", ops=[{"name": "cpm.SparseAttention"}], verification={"cosine": 1.0}
    )
    assert Manifest.loads(original.dumps()) == original


def test_unknown_top_level_keys_are_kept(bundle: Path) -> None:
    edit(bundle, lambda data: data.update(future={"a": 1}))
    loaded = open_bundle(bundle).manifest
    assert loaded.extra == {"future": {"a": 1}}
    assert json.loads(loaded.dumps())["future"] == {"a": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("target"), "target: expected a string, got nothing"),
        (lambda d: d.update(vocab_size=True), "vocab_size: expected an integer, got true or false"),
        (lambda d: d.update(num_layers=0), "num_layers: expected at least 1, got 0"),
        (lambda d: d["context"].update(max_context="long"), "context.max_context: expected an integer"),
        (
            lambda d: d["files"]["config.json"].update(sha256="00"),
            r'files\["config.json"\].sha256: expected 64',
        ),
        (
            lambda d: d["files"]["config.json"].pop("bytes"),
            r'files\["config.json"\].bytes: expected an integer',
        ),
        (lambda d: d.update(ops=["x"]), r"ops\[0\]: expected an object, got a string"),
        (lambda d: d["engine"].pop("requires"), "engine.requires: expected a string, got nothing"),
        (lambda d: d.update(format_version=0), "format_version: expected at least 1, got 0"),
    ],
)
def test_a_malformed_manifest_names_the_key(bundle: Path, change: Any, message: str) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "\x00"])
def test_a_manifest_that_is_no_json_object(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        open_bundle(bundle)


def test_a_newer_version_names_both_and_says_upgrade(bundle: Path) -> None:
    edit(bundle, lambda data: data.update(format_version=7, files="meaning changed"))
    with pytest.raises(BundleError, match="format version 7; this cpm-edge reads up to 1") as caught:
        open_bundle(bundle)
    assert "upgrade" in (caught.value.hint or "")


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle folder"):
        open_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match=f"has no {MANIFEST}"):
        open_bundle(tmp_path)


def test_the_remains_of_an_interrupted_overwrite_are_pointed_out(bundle: Path) -> None:
    bundle.rename(bundle.parent / ".bundle.old")
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert ".bundle.old" in (caught.value.hint or "")


def test_a_missing_and_a_short_file(bundle: Path) -> None:
    model = bundle / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model.onnx: expected 18 bytes, got 17"):
        open_bundle(bundle)
    model.unlink()
    with pytest.raises(BundleError, match=r"model.onnx is missing"):
        open_bundle(bundle)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte(bundle: Path) -> None:
    flip(bundle / "model.onnx")
    with pytest.raises(BundleError, match=r"model.onnx is damaged: expected SHA-256"):
        open_bundle(bundle)


def test_a_byte_flipped_after_a_good_check_is_still_found(bundle: Path) -> None:
    open_bundle(bundle)
    stat = (bundle / "model.onnx").stat()
    flip(bundle / "model.onnx")
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(bundle)
    os.utime(bundle / "model.onnx", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(bundle, check=True)


def test_hashes_are_remembered_outside_the_bundle(bundle: Path, hashed: list[str], tmp_path: Path) -> None:
    before = sorted(bundle.rglob("*"))
    open_bundle(bundle)
    assert "model.onnx" in hashed
    hashed.clear()
    open_bundle(bundle)
    assert hashed == []
    open_bundle(bundle, check=True)
    assert "model.onnx" in hashed
    assert sorted(bundle.rglob("*")) == before
    assert list((tmp_path / "user-cache" / "checked").iterdir())


def test_a_moved_or_edited_bundle_is_hashed_again(bundle: Path, hashed: list[str]) -> None:
    open_bundle(bundle)
    hashed.clear()
    moved = bundle.rename(bundle.parent / "moved")
    open_bundle(moved)
    assert "model.onnx" in hashed
    hashed.clear()
    edit(moved, lambda data: data.update(producer="somebody else"))
    open_bundle(moved)
    assert "model.onnx" in hashed


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("CPM_EDGE_CACHE", str(tmp_path / "a-file"))
    open_bundle(bundle)
    open_bundle(bundle)


def test_a_damaged_note_is_ignored(bundle: Path, tmp_path: Path, hashed: list[str]) -> None:
    open_bundle(bundle)
    for note in (tmp_path / "user-cache" / "checked").iterdir():
        note.write_text("[]")
    hashed.clear()
    open_bundle(bundle)
    assert "model.onnx" in hashed


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "C:/x",
        "C:x",
        "..\\x",
        "a\\b",
        "",
        ".",
        "a//b",
        "a/",
        "x\0",
        "f:ads",
    ],
)
def test_paths_that_leave_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "x").write_text("secret")
    edit(bundle, lambda data: data["files"].update({name: data["files"]["config.json"]}))
    with pytest.raises(BundleError, match="expected a relative path inside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_that_leave_the_bundle(bundle: Path, kind: str) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    (outside / "config.json").write_bytes((bundle / "config.json").read_bytes())
    if kind == "file":
        (bundle / "config.json").unlink()
        (bundle / "config.json").symlink_to(outside / "config.json")
    else:
        (bundle / "sub").symlink_to(outside)
        edit(bundle, lambda d: d["files"].update({"sub/config.json": d["files"]["config.json"]}))
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        open_bundle(bundle)


def test_a_link_to_the_bundle_itself_is_fine(bundle: Path) -> None:
    (bundle.parent / "link").symlink_to(bundle)
    assert open_bundle(bundle.parent / "link").path == bundle.resolve()


def test_only_listed_files_are_used(bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_text("smuggled in")
    opened = open_bundle(bundle)
    assert opened.optional("chat_template.jinja") is None
    assert opened.read_json("nothing.json") == {}
    with pytest.raises(BundleError, match=r"has no chat_template.jinja"):
        opened.file("chat_template.jinja")


def test_json_files_must_hold_objects(tmp_path: Path) -> None:
    opened = open_bundle(make_bundle(tmp_path / "b", {"config.json": [1]}))
    with pytest.raises(BundleError, match=r"config.json: expected a JSON object, got list"):
        opened.read_json("config.json")


def test_hash_files_covers_subfolders_and_refuses_links(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"abc")
    (tmp_path / MANIFEST).write_text("{}")
    files = hash_files(tmp_path)
    assert list(files) == ["sub/a"]
    assert dataclasses.astuple(files["sub/a"]) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        3,
    )
    (tmp_path / "link").symlink_to(tmp_path / "sub" / "a")
    with pytest.raises(BundleError, match="link: a bundle holds only plain files"):
        hash_files(tmp_path)


@pytest.mark.parametrize(
    ("requires", "version", "ok"),
    [
        (">=1.24", "1.24", True),
        (">=1.24", "1.9.9", False),
        (">=1.24,<2", "1.32.0", True),
        (">=1.24, <2", "2.0", False),
        ("==2026.4.1", "2026.4.1-22982-0badcafe-releases/2026/4", True),
        ("==2026.4.1", "2026.4.1.0", True),
        ("==2026.4.1", "2026.4.2", False),
        ("<2", "1.99.dev3", True),
        ("", "anything", True),
    ],
)
def test_engine_versions(requires: str, version: str, ok: bool) -> None:
    if ok:
        check_engine(requires, version)
        return
    with pytest.raises(BackendError, match="onnxruntime: expected version"):
        check_engine(requires, version, name="onnxruntime")


def test_an_unknown_requirement_is_refused() -> None:
    with pytest.raises(BundleError, match=r"got '~=1.2'"):
        check_engine("~=1.2", "1.2")

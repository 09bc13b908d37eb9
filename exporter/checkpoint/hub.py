"""Checkpoints fetched from the Hugging Face hub, or from its cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpm_edge.exporter.errors import CheckpointError

# Only data: a checkpoint's *.py files are neither needed nor wanted.
METADATA_FILES = [
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "*.index.json",
]
# Tried in this order, so that one format is downloaded, not every one that the repository offers.
WEIGHT_FILES = (
    ["model.safetensors", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model-*.bin"],
    ["*.safetensors"],
)


def download(repo_id: str, revision: str | None) -> Path:
    """The local snapshot folder of ``repo_id``, downloaded unless it is cached.

    HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT are honoured by huggingface_hub itself.

    Raises:
        CheckpointError: no such repository or revision, no access, no network, offline and not cached,
            or the repository holds no weights that can be read.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{repo_id}: downloading needs the package huggingface_hub",
            hint='pip install "cpm-edge[export]", or pass a local folder',
        ) from error
    with _hub_errors(repo_id, revision), _progress_on_terminals():
        for patterns in WEIGHT_FILES:
            folder = Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=METADATA_FILES + patterns)
            )
            if any(next(folder.glob(pattern), None) for pattern in patterns):
                return folder
    raise CheckpointError(
        f"{repo_id} holds no safetensors and no PyTorch weights",
        hint=f"for a GGUF repository: hf download {repo_id} FILE.gguf --local-dir . and pass the file",
    )


def download_config(repo_id: str, revision: str | None) -> Path:
    """The local path of the repository's config.json, and nothing else of it.

    Raises:
        CheckpointError: as for ``download``.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"{repo_id}: downloading needs the package huggingface_hub",
            hint='pip install "cpm-edge[export]", or pass a local folder',
        ) from error
    with _hub_errors(repo_id, revision), _progress_on_terminals():
        return Path(hf_hub_download(repo_id, "config.json", revision=revision))


@contextmanager
def _progress_on_terminals() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the hub client's exceptions into ours."""
    from huggingface_hub import constants, errors

    # The HTTP library under the client, and so the base of its errors, differs between its versions.
    bases: tuple[type[Exception], ...] = tuple(
        base
        for base in errors.HfHubHTTPError.__mro__
        if issubclass(base, Exception) and base is not Exception
    )
    at = f"{repo_id} (revision {revision})" if revision else repo_id
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at}: access is restricted by its authors",
            hint="accept the terms on the model's page, then set HF_TOKEN or run: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at}: no such repository at {constants.ENDPOINT}, or it is private",
            hint="check the spelling; for a private one set HF_TOKEN or run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{at}: no such branch, tag or commit",
            hint="the model's page lists them; leave --revision out for main",
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{repo_id}: not a Hugging Face id: {error}", hint="expected an id like openbmb/MiniCPM4-0.5B"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _not_reachable(at, error) from error
    except bases as error:
        raise CheckpointError(
            f"{at}: the download failed: {type(error).__name__}: {error}",
            hint="run the command again: finished files are kept; check the network and free disk space",
        ) from error


def _not_reachable(at: str, error: Exception) -> CheckpointError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return CheckpointError(
            f"{at}: HF_HUB_OFFLINE is set and the cache {constants.HF_HUB_CACHE} does not hold all of it",
            hint="unset HF_HUB_OFFLINE once to download it, or point HF_HOME at the right cache",
        )
    cause = error.__cause__ or error
    return CheckpointError(
        f"{at}: {constants.ENDPOINT} cannot be reached and the checkpoint is not cached: {cause}",
        hint="check the network and HF_ENDPOINT, or pass a local folder",
    )

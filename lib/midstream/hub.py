"""Snapshots of the Hugging Face Hub: its files alone, never its code, and each fault told in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from midstream.assets import by_revision, disk_faults_told
from midstream.errors import AssetError


@by_revision
def fetch_snapshot(
    repository: str,
    revision: str | None,
    *,
    kind: Literal["model", "dataset"],
    wanted: list[str],
    unwanted: list[str] | None = None,
    instead: str,
) -> Path:
    """The folder of a repository's files in the Hub's cache, fetched where they are not there.

    `wanted` and `unwanted` are patterns of paths; `instead` says what to use where the Hub cannot be reached.
    Raises `AssetError`.
    """
    from huggingface_hub import constants, errors, snapshot_download

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    try:
        with disk_faults_told(Path(constants.HF_HUB_CACHE)):
            found = snapshot_download(
                repository, repo_type=kind, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
    except AssetError:
        raise
    except errors.GatedRepoError as error:
        raise AssetError(
            f"{repository} is gated: accept its licence at {page} and log in with `hf auth login`, then try again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AssetError(f"The Hub has no {kind} {repository}, or shows it only to those logged in.") from error
    except errors.RevisionNotFoundError as error:
        raise AssetError(f"The Hub's {kind} {repository} has no revision {revision or 'main'}.") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        raise AssetError(
            f"The {kind} {repository} is not in the Hugging Face cache and the Hub cannot be reached; connect to the "
            f"network, or use {instead}."
        ) from error
    return Path(found)

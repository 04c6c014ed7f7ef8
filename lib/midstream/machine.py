"""The machine a run happened on: device, memory, package versions, and the commit of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil

from midstream.places import is_checkout, root

PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "peft", "numpy", "scipy", "scikit-learn")
GIB = 2**30


def gpus() -> int:
    """How many CUDA devices this process could use; imports torch."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
    """The GPU this process has computed on, else its processor and cores."""
    if _gpu_peak() > 0:
        return str(sys.modules["torch"].cuda.get_device_name(0))
    return f"{_processor()}, {cores()} cores"


def peak_memory() -> dict[str, float]:
    """High-water marks of this process in GiB: resident memory, and GPU memory where there was any."""
    peaks = {"process": _resident_peak() / GIB}
    if _gpu_peak() > 0:
        peaks["gpu"] = _gpu_peak() / GIB
    return {name: float(f"{gib:.3g}") for name, gib in peaks.items()}


def versions() -> dict[str, str]:
    """Python and the installed packages that numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> tuple[str, bool]:
    """The checkout's commit, and whether `lib/` or `notebooks/` differ from it; ("unknown", True) without git."""
    head = _git("rev-parse", "HEAD") if is_checkout() else None
    if head is None:
        return "unknown", True
    changes = _git("status", "--porcelain", "--", "lib", "notebooks")
    return head, changes != ""


def memory_allowed() -> int:
    """Bytes this machine, or the container this process lives in, can give."""
    total = int(psutil.virtual_memory().total)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total


def environment() -> dict[str, str]:
    """This process's environment for a child that must find the same checkout."""
    return {**os.environ, "MIDSTREAM_ROOT": str(root())}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(root()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """The processor's name as people know it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _resident_peak() -> int:
    """The high-water mark of this process's resident memory in bytes (the present value where none is kept)."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gpu_peak() -> int:
    """Bytes of GPU memory this process has had allocated at most; 0 where torch was never imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.max_memory_allocated())

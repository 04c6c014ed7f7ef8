"""GPU slots: run a command with GPUs that no other slot of this machine holds.

`python -m midstream.slots COUNT COMMAND…` waits until COUNT GPUs are free, locks them for as long as the command
lives, and names them in CUDA_VISIBLE_DEVICES. A batch system that hands out GPUs itself (SLURM) is left to do so.
Snakemake's `resources: gpu` counts GPUs and does not choose them; this does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from midstream.errors import RequestError

WAIT = 0.5


def visible() -> list[str]:
    """The GPUs this process may use, by index or UUID."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listing.stdout.splitlines()) if line.startswith("GPU ")]


def take(count: int, devices: list[str]) -> list[str]:
    """Lock `count` of the devices for the rest of this process's life, all of them at once or none; waits for them."""
    if count > len(devices):
        raise RequestError(f"This run takes {count} GPU{'s' * (count > 1)} and {len(devices) or 'none'} can be seen.")
    while True:
        held = {device: handle for device in devices if (handle := _try(device)) is not None}
        chosen = list(held)[:count] if len(held) >= count else []
        for device, handle in held.items():
            if device in chosen:
                os.set_inheritable(handle, True)
            else:
                os.close(handle)
        if chosen:
            return chosen
        time.sleep(WAIT)


def _try(device: str) -> int | None:
    """An open handle that holds a device's lock, or None where another process holds it."""
    import fcntl

    folder = Path(tempfile.gettempdir()) / f"midstream-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    handle = os.open(folder / f"{device}.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def main() -> None:
    """Become the command, with its GPUs."""
    count, command = int(sys.argv[1]), sys.argv[2:]
    if count and "SLURM_JOB_ID" not in os.environ:
        try:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(take(count, visible()))
        except RequestError as error:
            sys.exit(f"midstream: {error}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

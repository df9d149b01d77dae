"""Run one of the package's commands in this process; print its peak memory as the last line.

python -m benchmarks.command capt-export RUN --out BUNDLE
"""

import importlib
import json
import sys
from importlib import metadata
from pathlib import Path


def main() -> None:
    """Find the command as the installed package declares it."""
    (entry,) = metadata.entry_points(group="console_scripts", name=sys.argv[1])
    command = getattr(importlib.import_module(entry.module), entry.attr)
    command(sys.argv[2:], standalone_mode=False)
    print(json.dumps({"peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """Return the most memory that this process has held, on Linux.

    `getrusage` would count what the process that started it had held by then.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(peak)


if __name__ == "__main__":
    main()

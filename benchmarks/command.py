"""Run one of the package's commands in this process; print its peak memory as the last line.

python -m benchmarks.command capt-export RUN --out BUNDLE
"""

import importlib
import json
import resource
import sys
from importlib import metadata


def main() -> None:
    """Find the command as the installed package declares it."""
    (entry,) = metadata.entry_points(group="console_scripts", name=sys.argv[1])
    command = getattr(importlib.import_module(entry.module), entry.attr)
    command(sys.argv[2:], standalone_mode=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kibibytes
    print(json.dumps({"peak_bytes": peak}))


if __name__ == "__main__":
    main()

import json
import os
import subprocess
import sys
from importlib import metadata

from capt_deploy.core import machine


def test_versions_are_those_that_are_installed():
    own = machine.versions()
    assert own["numpy"] == metadata.version("numpy")
    assert own["python"].startswith("3.")
    assert machine.installed(["numpy", "no-such-package"]) == {"numpy": own["numpy"]}


def test_the_machine_can_be_written_as_json():
    own = machine.describe_machine()
    assert json.loads(json.dumps(own, allow_nan=False)) == own
    assert own.keys() == {"system", "cpu", "cores", "memory_bytes", "gpus"}
    assert own["cpu"] and 1 <= own["cores"] <= os.cpu_count()


def test_resident_memory_grows_with_what_is_held():
    # In a process of its own: one that has run other tests gives back memory of theirs meanwhile.
    code = (
        "from capt_deploy.core.machine import resident_memory as now\n"
        "before = now(); held = b'x' * 30_000_000; after = now()\n"
        "print(before is None or 25e6 < after - before < 60e6)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"

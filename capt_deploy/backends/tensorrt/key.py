"""The key of an engine in the cache."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

AMPERE = 80  # compute capability


@dataclass(frozen=True)
class EngineKey:
    """Everything in which engines differ."""

    library: str  # import name: tensorrt, tensorrt_rtx
    version: str  # of the library
    platform: str  # such as linux-x86_64
    sm: int  # compute capability, 89 for 8.9
    gpu: str = ""  # its name, if the engine runs on no other GPU
    driver: str = ""  # likewise
    onnx: str = ""  # SHA-256 of the graph
    weights: str = ""  # SHA-256 of the weights in other files, if there are any
    precision: str = ""
    batches: tuple[int, ...] = ()  # smallest, usual, largest
    kind: str = "engine"  # or what the library keeps beside it: "timing", "runtime"
    portable: str = ""  # what may differ where it runs: "hardware", "version"

    def to_json(self) -> dict[str, Any]:
        """Return the key as JSON reads it back."""
        values = {**asdict(self), "batches": list(self.batches)}
        if not self.portable:  # entries of earlier versions have no such value
            del values["portable"]
        return values

    @property
    def portables(self) -> "list[EngineKey]":
        """Return the keys under which portable engines lie that run where this one does.

        "hardware": from Ampere (SM 80) on, whatever the GPU and driver. "version": on a GPU of this
        name, in this major version of the library from the version that built it on.
        """
        version = self.version.split(".")[0]
        anywhere = replace(self, sm=AMPERE, gpu="", driver="", portable="hardware")
        later = replace(self, version=version, driver="", portable="version")
        return [anywhere, later] if self.sm >= AMPERE else [later]

    @property
    def name(self) -> str:
        """Return the name of the entry, without a suffix."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

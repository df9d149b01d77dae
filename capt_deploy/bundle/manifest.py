"""The manifest: `manifest.json` of a bundle, and the same JSON inside each of its graphs."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from capt_deploy.bundle.records import read_record
from capt_deploy.confidence.calibration import (
    DISTANCE_AWARE,
    LARGEST,
    Calibration,
    TopLabelMap,
    VectorScaling,
)
from capt_deploy.core.errors import BundleError
from capt_deploy.core.files import parse_json
from capt_deploy.data.preprocess import PreprocessConfig

SCHEMA_VERSION = 1
METADATA_KEY = "capt_manifest"  # metadata key of the manifest inside an ONNX file
PRECISION_KEY = "capt_precision"  # metadata key of the graph's precision
CLEANING_NAMES = ("whitespace", "lower", "canonicalize")  # of texts, by their names in open_clip
_LONGEST_TEXT = 2**16  # tokens
_LARGEST_FILE = 2**40  # bytes
_SHA256 = re.compile("[0-9a-f]{64}")
# The second temperature needs embeddings that are those of the frozen model.
_TEMPERATURES = ({"temperature", "zero_shot_temperature"}, {"temperature"})


@dataclass(frozen=True)
class Graph:
    """One ONNX file of a bundle."""

    file: str
    opset: int
    layout: str = "NHWC"  # of the input `images`
    dtype: str = "uint8"
    weights: str | None = None  # a second file, for graphs larger than one file can be

    def __post_init__(self) -> None:
        if (self.layout, self.dtype) != ("NHWC", "uint8"):
            raise ValueError(
                f"the graph takes {self.layout} {self.dtype}, this reader knows NHWC uint8; "
                f"upgrade capt"
            )


@dataclass(frozen=True)
class OpenVocabulary:
    """How a class name becomes a class row where the bundle is used."""

    prompts: tuple[str, ...]  # with {} for the name, in the order of the graph's input
    context_length: int  # the most tokens of a text, start and end included
    pad: int  # token id behind the end
    cuttable: bool  # whether the graph also takes shorter token rows
    cleaning: str  # of texts before tokenization; one of CLEANING_NAMES
    logit_bias: float = 0.0
    file: str = "text.onnx"
    tokenizer: str = "tokenizer.json"
    weights: str | None = None  # a second file, for graphs larger than one file can be

    def __post_init__(self) -> None:
        if not self.prompts or not all("{}" in prompt for prompt in self.prompts):
            raise ValueError("expected prompts with {} for the name")
        if self.cleaning not in CLEANING_NAMES:
            raise ValueError(f"cleaning {self.cleaning!r}: unknown; upgrade capt to read it")
        if not (1 <= self.context_length <= _LONGEST_TEXT and 0 <= self.pad < 2**31):
            raise ValueError(
                f"expected a context_length of 1 to {_LONGEST_TEXT} and a pad that is a token, "
                f"came {self.context_length} and {self.pad}"
            )
        if not abs(self.logit_bias) <= LARGEST:
            raise ValueError(f"logit_bias: expected a logit, came {self.logit_bias}")


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256: expected 64 hexadecimal digits, came {self.sha256!r}")
        if not 0 <= self.bytes <= _LARGEST_FILE:
            raise ValueError(f"bytes: expected the size of a file, came {self.bytes}")


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader needs besides the graphs.

    A field here is a key of the JSON form: `read_record` reads and checks it by its type, and
    `to_dict` writes it. A new one needs a default, so that bundles without it still load.
    """

    class_names: tuple[str, ...]  # in the order of the graph's columns
    tuned: tuple[bool, ...]  # whether the class was tuned on
    preprocess: PreprocessConfig
    graphs: Mapping[str, Graph]  # by precision
    calibration: Mapping[str, Mapping[str, float | bool]]  # by precision; applied by the graph
    confusion_pairs: tuple[Mapping[str, Any], ...]  # `true`, `predicted`, `count`
    training: Mapping[str, Any]  # provenance: model, data fingerprint, seed, versions
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    verified: bool = True  # False if the bundle was written although the gate had failed
    open_vocabulary: OpenVocabulary | None = None  # where classes can be added
    # Calibration besides temperatures; applied by the graphs as well
    top_label: TopLabelMap | None = None
    vector_scaling: VectorScaling | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if len(self.tuned) != len(self.class_names) or not self.class_names:
            raise ValueError("expected one `tuned` flag for each of its class names")
        if self.vector_scaling and len(self.vector_scaling.scales) != len(self.class_names):
            raise ValueError("vector_scaling: expected a scale for each class")
        if not self.graphs:
            raise ValueError("names no graph")
        for precision in self.graphs:
            calibration = self.calibration.get(precision, {})
            if set(calibration) - {DISTANCE_AWARE} not in _TEMPERATURES:
                raise ValueError(f"expected {sorted(_TEMPERATURES[0])} of {precision}")
            if calibration.get(DISTANCE_AWARE, True) is not True:
                raise ValueError(f"{DISTANCE_AWARE} of {precision}: expected true or none")
            for name in {*calibration} - {DISTANCE_AWARE}:
                value = calibration[name]
                if isinstance(value, bool) or not 1 / LARGEST <= value <= LARGEST:
                    raise ValueError(
                        f"{name} of {precision}: expected {1 / LARGEST:g} to {LARGEST:g}, "
                        f"came {value!r}"
                    )
        classes = {*self.class_names}
        for pair in self.confusion_pairs:
            names = {str(pair.get(key)) for key in ("true", "predicted")}
            if unknown := names - classes:
                raise ValueError(f"confusion pairs name unknown classes {sorted(unknown)}")
            if keys := {*pair} - {"true", "predicted", "count"}:
                raise ValueError(f"confusion pairs have unknown keys {sorted(keys)}")
            count = pair.get("count", 1)
            if type(count) is not int or count < 0:
                raise ValueError(f"a confusion pair's count is {count!r}")

    def calibration_of(self, precision: str) -> Calibration:
        """Return the calibration inside one graph, without the factors of DAC."""
        entry = self.calibration[precision]
        return Calibration.from_manifest(entry, self.top_label, self.vector_scaling)

    @property
    def linked_files(self) -> list[str]:
        """Return the names of all files that the manifest refers to, hashed or not."""
        names = [*self.files]
        for graph in self.graphs.values():
            names += [graph.file, graph.weights or graph.file]
        if (text := self.open_vocabulary) is not None:
            names += [text.file, text.tokenizer, text.weights or text.file]
        return names

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "Manifest":
        """Build a manifest from its JSON form; `where` is named in errors.

        Raises:
            BundleError: another schema version, unknown or missing keys, or unusable values.
        """
        if not isinstance(values, dict):
            raise BundleError(f"{where}: expected a JSON object")
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{where}: schema version {version!r}, this reader knows {SCHEMA_VERSION}; "
                f"upgrade capt or export the bundle again"
            )
        return read_record(cls, values, where)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Build a manifest from JSON text; see `from_dict`."""
        values = parse_json(text, where, BundleError)
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as cause:  # half a surrogate pair, which nothing can print
            raise BundleError(f"{where}: not a text in UTF-8 ({cause})") from cause
        return cls.from_dict(values, where)

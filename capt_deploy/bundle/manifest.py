"""The manifest: `manifest.json` of a bundle, and the same JSON inside each of its graphs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from capt_deploy.bundle.records import read_record
from capt_deploy.confidence.calibration import (
    DISTANCE_AWARE,
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
    cleaning: str  # of texts before tokenization; see `open_vocabulary.CLEANINGS`
    logit_bias: float = 0.0
    file: str = "text.onnx"
    tokenizer: str = "tokenizer.json"
    weights: str | None = None  # a second file, for graphs larger than one file can be

    def __post_init__(self) -> None:
        if not self.prompts or not all("{}" in prompt for prompt in self.prompts):
            raise ValueError("expected prompts with {} for the name")


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file."""

    sha256: str
    bytes: int


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
            self.calibration_of(precision)  # raises where the temperature is not above 0
        for pair in self.confusion_pairs:
            if unknown := {pair.get("true"), pair.get("predicted")} - {*self.class_names}:
                raise ValueError(
                    f"confusion pairs name unknown classes {sorted(map(str, unknown))}"
                )
            if type(pair.get("count", 1)) is not int:
                raise ValueError(f"a confusion pair's count is {pair['count']!r}")

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

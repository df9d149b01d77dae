"""What a bundle says about itself: `manifest.json`, and the same inside the ONNX file."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, get_origin

from capt_deploy.confidence.top_label import TopLabelMap
from capt_deploy.confidence.vector_scaling import VectorScaling
from capt_deploy.core.errors import BundleError
from capt_deploy.data.preprocess import PreprocessConfig

SCHEMA_VERSION = 1
# The second one only where the graph's embeddings are also those of the frozen model.
_CALIBRATIONS = ({"temperature", "zero_shot_temperature"}, {"temperature"})
DISTANCE_AWARE = "distance_aware"  # True beside them where the graph has the factors of DAC
METADATA_KEY = "capt_manifest"  # under which an ONNX file carries its manifest
PRECISION_KEY = "capt_precision"  # and which of the manifest's graphs it is


@dataclass(frozen=True)
class Graph:
    """One ONNX file of a bundle."""

    file: str
    opset: int
    layout: str = "NHWC"  # of the input `images`
    dtype: str = "uint8"
    weights: str | None = None  # a second file, where one cannot hold them


@dataclass(frozen=True)
class OpenVocabulary:
    """How a name becomes a row of the head where the bundle is used."""

    prompts: tuple[str, ...]  # with {} for the name, in the order in which the graph takes them
    context_length: int  # the most tokens of a text, start and end counted
    pad: int  # token id behind the end
    cuttable: bool  # whether the graph also takes shorter rows
    cleaning: str  # of texts, before they become tokens; see `open_vocabulary.CLEANINGS`
    logit_bias: float = 0.0
    file: str = "text.onnx"
    tokenizer: str = "tokenizer.json"
    weights: str | None = None  # a second file, where one cannot hold them

    @property
    def files(self) -> list[str]:
        """Its files in the bundle."""
        return [name for name in (self.file, self.tokenizer, self.weights) if name]


@dataclass(frozen=True)
class FileRecord:
    """Content check of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs besides the graph. Unknown versions and keys are rejected."""

    class_names: tuple[str, ...]  # in the order of the graph's columns
    tuned: tuple[bool, ...]  # whether the prompt was tuned on that class
    preprocess: PreprocessConfig
    graphs: Mapping[str, Graph]  # by precision
    calibration: Mapping[str, Mapping[str, float]]  # by precision; already inside the graph
    confusion_pairs: tuple[Mapping[str, Any], ...]
    training: Mapping[str, Any]  # provenance: model, data fingerprint, seed, versions
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    verified: bool = True  # False if it was written although the gate had failed
    open_vocabulary: OpenVocabulary | None = None  # where classes can be added
    # What calibrates besides temperatures; inside the graphs as well
    top_label: TopLabelMap | None = None
    vector_scaling: VectorScaling | None = None
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "preprocess": self.preprocess.to_dict()}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "Manifest":
        """Read the JSON form.

        Raises:
            BundleError: another schema version, unknown or missing keys, or values of wrong form.
        """
        if not isinstance(values, dict):
            raise BundleError(f"{where}: expected a JSON object")
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{where}: schema version {version!r}, this reader knows {SCHEMA_VERSION}; "
                f"upgrade capt or export the bundle again"
            )
        try:
            _check_keys(cls, values, where)
            for key in ("class_names", "tuned", "confusion_pairs"):
                if not isinstance(values[key], list | tuple):
                    raise TypeError(f"{key} is no list")
            manifest = cls(
                **{
                    **values,
                    "class_names": tuple(str(name) for name in values["class_names"]),
                    "tuned": tuple(bool(flag) for flag in values["tuned"]),
                    "preprocess": PreprocessConfig.from_dict(values["preprocess"], BundleError),
                    "graphs": _records(Graph, values["graphs"], where),
                    "files": _records(FileRecord, values.get("files", {}), where),
                    "confusion_pairs": tuple(values["confusion_pairs"]),
                    "open_vocabulary": _open_vocabulary(values.get("open_vocabulary"), where),
                    **_calibrators(values),
                }
            )
            manifest._check(where)
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise BundleError(f"{where}: a value has the wrong form ({cause})") from cause
        return manifest

    def _check(self, where: str) -> None:
        if len(self.tuned) != len(self.class_names) or not self.class_names:
            raise BundleError(f"{where}: expected one `tuned` flag for each of its class names")
        mined = {pair[key] for pair in self.confusion_pairs for key in ("true", "predicted")}
        if unknown := mined - set(self.class_names):
            raise BundleError(f"{where}: confusion pairs name unknown classes {sorted(unknown)}")
        for pair in self.confusion_pairs:
            if type(pair.get("count", 1)) is not int:
                raise BundleError(f"{where}: a confusion pair's count is {pair['count']!r}")
        for precision, graph in self.graphs.items():
            if (graph.layout, graph.dtype) != ("NHWC", "uint8"):
                raise BundleError(
                    f"{where}: the {precision} graph takes {graph.layout} {graph.dtype}, this "
                    f"reader knows NHWC uint8; upgrade capt"
                )
            calibration = self.calibration.get(precision, {})
            if set(calibration) - {DISTANCE_AWARE} not in _CALIBRATIONS:
                raise BundleError(f"{where}: expected {sorted(_CALIBRATIONS[0])} of {precision}")
            if calibration.get(DISTANCE_AWARE, True) is not True:
                raise BundleError(
                    f"{where}: {DISTANCE_AWARE} of {precision}: expected true or none"
                )
        if not self.graphs:
            raise BundleError(f"{where}: names no graph")

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Read JSON text; see `from_dict`."""
        try:
            return cls.from_dict(json.loads(text), where)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as cause:
            raise BundleError(f"{where}: not JSON ({cause})") from cause


def _check_keys(kind: Any, values: Mapping[str, Any], where: str) -> None:
    known = {f.name for f in fields(kind)}
    required = {
        f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
    }
    if unknown := set(values) - known:
        raise BundleError(f"{where}: unknown keys {sorted(unknown)}; upgrade capt to read it")
    if missing := required - set(values):
        raise BundleError(f"{where}: missing keys {sorted(missing)}")


def _calibrators(values: Mapping[str, Any]) -> dict[str, Any]:
    own, vector = values.get("top_label"), values.get("vector_scaling")
    top_label = None if own is None else TopLabelMap.from_dict(own)
    if vector is not None:
        if set(vector) != {"scales", "biases"}:
            raise ValueError(f"vector scaling: unknown keys {sorted(vector)}")
        parts = (tuple(map(float, vector[name])) for name in ("scales", "biases"))
        vector = VectorScaling(*parts)
        if len(vector.scales) != len(values["class_names"]):
            raise ValueError("vector scaling: expected a scale for each class")
    return {"top_label": top_label, "vector_scaling": vector}


def _open_vocabulary(values: Any, where: str) -> OpenVocabulary | None:
    if values is None:
        return None
    if not isinstance(values.get("prompts"), list | tuple):
        raise TypeError("prompts is no list")
    own = {**values, "prompts": tuple(str(prompt) for prompt in values["prompts"])}
    found: OpenVocabulary = _records(OpenVocabulary, {"open vocabulary": own}, where).popitem()[1]
    if not found.prompts or not all("{}" in prompt for prompt in found.prompts):
        raise BundleError(f"{where}: expected prompts with {{}} for the name")
    return found


def _records(kind: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name, record in values.items():
        _check_keys(kind, record, f"{where}, {name}")
        for key, value in record.items():
            expected = kind.__annotations__[key]
            if not isinstance(value, tuple if get_origin(expected) is tuple else expected):
                raise TypeError(f"{key} of {name} is {value!r}")
    return {name: kind(**record) for name, record in values.items()}

"""Add classes by name where a bundle is used: the text side of an open bundle, without torch.

A bundle of `capt-export --open-vocab` holds the text tower with its learned prompts as a graph,
and the tokenizer. Texts are cleaned as open_clip cleans them, by the same library.
"""

import html
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends.base import typed_errors
from capt_deploy.backends.onnxruntime import start_session
from capt_deploy.bundle.manifest import OpenVocabulary
from capt_deploy.bundle.read import Bundle
from capt_deploy.confidence.calibration import Calibration
from capt_deploy.confidence.distance_aware import TunedTexts
from capt_deploy.core.errors import BundleError, ConfigError
from capt_deploy.core.install import install_hint
from capt_deploy.data.class_names import distinct_names

ROW_OUTPUTS = ("rows", "hand_written")  # of the text graph; the second one with DAC only
_BATCH = 64  # names encoded at once
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _join_words(text: str) -> str:
    return " ".join(text.split())


# open_clip's cleaning functions by their names there, after the repair of mojibake and HTML.
CLEANINGS: Mapping[str, Callable[[str], str]] = {
    "whitespace": _join_words,
    "lower": lambda text: _join_words(text).lower(),
    "canonicalize": lambda text: _join_words(
        text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    ),
}


class PromptTokenizer:
    """Puts class names into the prompts of a bundle and tokenizes them. Thread-safe."""

    def __init__(self, record: OpenVocabulary, tokenizer: bytes) -> None:
        """Open the tokenizer, given the content of `tokenizer.json`.

        Raises:
            BundleError: it cannot be read, or a library is missing.
        """
        self._record = record
        self._tokenizer, self._fix_text = _open_tokenizer(tokenizer)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text with start and end, without padding."""
        clean = html.unescape(html.unescape(self._fix_text(text))).strip()
        ids: list[int] = self._tokenizer.encode(CLEANINGS[self._record.cleaning](clean)).ids
        return ids

    def rows(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the graph's input, (classes, prompts, tokens), as short as the graph takes it.

        Raises:
            ConfigError: a name is too long for the text tower.
        """
        prompts, limit = self._record.prompts, self._record.context_length
        ids = [[self.ids(p.replace("{}", name)) for p in prompts] for name in names]
        lengths = [max(map(len, texts)) for texts in ids]
        for name, length in zip(names, lengths, strict=True):
            if length > limit:
                raise ConfigError(
                    f"class names: {name!r} is too long, {length} tokens with the prompt, and the "
                    f"model takes {limit}; shorten it"
                )
        size = max(lengths) if self._record.cuttable else limit
        pad = self._record.pad
        return np.array(
            [[text + [pad] * (size - len(text)) for text in texts] for texts in ids], np.int64
        )


class TextEncoder:
    """Encodes class names with the text tower of a bundle. Thread-safe."""

    def __init__(
        self,
        record: OpenVocabulary,
        tokenizer: bytes,
        onnx: bytes | Path,
        folder: Path | None = None,
    ) -> None:
        """Open tokenizer and graph.

        Args:
            record: the manifest's `open_vocabulary`.
            tokenizer: the content of `tokenizer.json`.
            onnx: the graph from `tokens` (classes, prompts, tokens) to `ROW_OUTPUTS`, each
                (classes, dim), or its file, which then nobody else may be able to change.
            folder: of weights that are not in the graph's own file.

        Raises:
            BundleError: the tokenizer cannot be read, or a library is missing.
            BackendError: the graph cannot be loaded.
        """
        self.tokens = PromptTokenizer(record, tokenizer)
        self.logit_bias = record.logit_bias
        self._session = start_session(onnx, "ORT_ENABLE_ALL", folder)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "TextEncoder":
        """Open the text side of a bundle.

        Raises:
            BundleError: the bundle has none, it was changed, or a library is missing.
        """
        record = bundle.manifest.open_vocabulary
        if record is None:
            raise BundleError(
                f"{bundle.path}: its classes are fixed; export the run with --open-vocab, or with "
                f"--classes and a list of the wanted ones"
            )
        tokenizer, onnx = bundle.read(record.tokenizer), bundle.read(record.file)
        if record.weights is None:
            return cls(record, tokenizer, onnx)
        with bundle.private_copy(record.weights) as folder:
            return cls(record, tokenizer, onnx, Path(folder))

    def rows(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Return scale·Ŵ_c of classes that were not tuned on, (classes, dim); never renormalised.

        Raises:
            ConfigError: a name is too long for the text tower.
        """
        return self._run(names, ROW_OUTPUTS[:1])[0]

    def both_rows(self, names: Sequence[str]) -> list[NDArray[np.float32]]:
        """Return scale·Ŵ_c and t⁰_c, each (classes, dim), the latter with unit norm; DAC only.

        Raises:
            ConfigError: a name is too long for the text tower.
        """
        return self._run(names, ROW_OUTPUTS)

    def _run(self, names: Sequence[str], outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        batches = [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)]
        tokens = [self.tokens.rows(batch) for batch in batches]
        with typed_errors("onnxruntime", "run the text graph"):
            parts = [self._session.run([*outputs], {"tokens": batch}) for batch in tokens]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]


@dataclass(frozen=True, eq=False)
class ClassHead:
    """The linear layer from image embeddings to the logits of all classes."""

    class_names: tuple[str, ...]
    tuned: tuple[bool, ...]
    weight: NDArray[np.float32]  # (classes, dim), over the temperature
    bias: NDArray[np.float32]  # (classes,)
    calibration: Calibration  # its temperature and vector scaling are in weight and bias
    tuned_texts: TunedTexts | None = None  # for the factors of further classes, with DAC

    @classmethod
    def from_bundle(cls, bundle: Bundle, precision: str) -> "ClassHead":
        """Return the layer inside one of a bundle's graphs."""
        manifest, tensors = bundle.manifest, bundle.text_embeddings()
        # The rows are written at the temperature of the first graph.
        first = manifest.calibration[next(iter(manifest.graphs))]["temperature"]
        calibration = bundle.calibration_of(precision)
        factor = np.float32(first / calibration.temperature)
        weight, bias = (tensors[name] * factor for name in ("text_embeddings", "bias"))
        head = cls(manifest.class_names, manifest.tuned, weight, bias, calibration)
        if calibration.factors is None:
            return head
        texts = [tensors.get(name) for name in ("tuned_rows", "tuned_hand_written")]
        if texts[0] is None or texts[1] is None:
            raise BundleError(
                f"{bundle.path}: knows no factors of further classes; export it again"
            )
        return replace(head, tuned_texts=TunedTexts(texts[0], texts[1]))

    def with_classes(self, texts: TextEncoder, names: Iterable[str]) -> "ClassHead":
        """Return the head with new classes behind the present ones.

        Raises:
            ConfigError: a name is empty, too long, or exists already.
        """
        new = distinct_names(names, self.class_names)
        if not new:
            return self
        temperature, factors = self.calibration.temperature, self.calibration.factors
        if factors is None or self.tuned_texts is None:
            rows = texts.rows(new)
        else:
            rows, hand_written = texts.both_rows(new)
            factors += tuple(self.tuned_texts.factors(rows, hand_written).tolist())
        if rows.shape[1:] != self.weight.shape[1:]:
            raise BundleError(
                f"the text graph returns rows of shape {rows.shape[1:]}, expected "
                f"{self.weight.shape[1:]} as the image embeddings have; export the bundle again"
            )
        class_names = (*self.class_names, *new)
        calibration = self.calibration.select(range(len(class_names)))
        bias = np.full(len(new), texts.logit_bias / temperature, np.float32)
        return ClassHead(
            class_names,
            (*self.tuned, *[False] * len(new)),
            np.concatenate([self.weight, rows / np.float32(temperature)]),
            np.concatenate([self.bias, bias]),
            replace(calibration, factors=factors),
            self.tuned_texts,
        )

    def logits(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the calibrated logits, (batch, classes), of unit-norm embeddings."""
        logits = np.asarray(embedding @ self.weight.T + self.bias, np.float32)
        return np.asarray(self.calibration.weigh(logits), np.float32)

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the calibrated probabilities, (batch, classes), of calibrated logits."""
        return self.calibration.probabilities(logits).astype(np.float32)


def _open_tokenizer(content: bytes) -> tuple[Any, Callable[[str], str]]:
    try:
        from ftfy import fix_text
        from tokenizers import Tokenizer
    except ImportError as cause:
        raise BundleError(
            f"classes can be added only with the package {cause.name}: {install_hint('open-vocab')}"
        ) from cause
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as cause:  # the library raises no type of its own
        raise BundleError(f"tokenizer.json cannot be read ({cause}); export it again") from cause
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, fix_text

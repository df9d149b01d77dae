"""The classes that a classifier knows: its bundle's, and those added to it. Thread-safe."""

from collections.abc import Iterable
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from capt_deploy.backends import Outputs
from capt_deploy.bundle.manifest import Manifest
from capt_deploy.bundle.read import Bundle
from capt_deploy.confidence.decisions import USUAL, DecisionOptions
from capt_deploy.confidence.monitor import Monitor
from capt_deploy.core.errors import BundleError
from capt_deploy.serving.prediction import Judge, Prediction

if TYPE_CHECKING:
    from capt_deploy.serving.open_vocabulary import Head, TextSide


class KnownClasses:
    """Makes predictions of a graph's outputs, and watches them once it is asked to."""

    def __init__(self, manifest: Manifest, bundle: Bundle | None) -> None:
        """Begin with the classes of a bundle, or of a lone graph."""
        self._manifest, self._bundle = manifest, bundle
        self._judge = Judge(manifest, None if bundle is None else bundle.decisions())
        self._changing = Lock()
        self._texts: TextSide | None = None
        # Once there are more classes than the graph's
        self._opened: tuple[Head, Judge] | None = None
        # And the options whose rejections it expects
        self._watch: tuple[Monitor, DecisionOptions] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, in the order of all probabilities; added ones behind the bundle's."""
        opened = self._opened
        return self._manifest.class_names if opened is None else opened[0].class_names

    @property
    def tuned(self) -> tuple[bool, ...]:
        """Whether the prompt was tuned on each class."""
        opened = self._opened
        return self._manifest.tuned if opened is None else opened[0].tuned

    def add(self, names: Iterable[str], precision: str, options: DecisionOptions) -> None:
        """Let all later predictions know further classes; all of them or none.

        Args:
            names: of the classes.
            precision: of the graph.
            options: wanted of predictions, which nobody can promise any more.

        Raises:
            ConfigError: a name is empty, too long for the text tower, or there already.
            BundleError: the bundle was not exported with `--open-vocab`, was changed, or a package
                is missing; or sets or rejection were asked for when it was loaded.
        """
        from capt_deploy.serving.open_vocabulary import Head, TextSide

        if self._bundle is None:
            raise BundleError("a lone graph has no text side; load the whole bundle to add classes")
        with self._changing:
            texts = self._texts = self._texts or TextSide.of(self._bundle)
            head = self._opened[0] if self._opened else Head.of(self._bundle, precision)
            temperature = self._manifest.calibration[precision]["temperature"]
            head = head.with_classes(texts, names, temperature)
            added = head.class_names[len(self._manifest.class_names) :]
            judge = Judge(self._manifest, self._judge.decisions, added)
            judge.check(options, asked=options is not USUAL)
            self._opened = (head, judge)
            if self._watch is not None:
                self._watch[0].extend(head.class_names)

    def check(self, options: DecisionOptions, *, asked: bool = False) -> None:
        """Make sure that what is wanted can be had; `asked`: somebody wants it.

        Raises:
            BundleError: there are no scores of validation images.
            ConfigError: they promise the wanted accuracy at no confidence.
        """
        judge = self._opened[1] if self._opened else self._judge
        judge.check(options, asked=asked)

    def monitor(self, options: DecisionOptions) -> Monitor:
        """Return what watches all predictions from the first call on; `options` are the usual ones.

        It compares them with those of the run's validation images, where the bundle has these. Of
        calls with other options, rejections are not counted.
        """
        with self._changing:
            if self._watch is None:
                known = self._judge.decisions
                expected = None if known is None else known.expected_reference(options)
                self._watch = Monitor(expected, self.names), options
            return self._watch[0]

    def predictions(
        self, outputs: Outputs, precision: str, options: DecisionOptions
    ) -> list[Prediction]:
        """Return a prediction for each image, of outputs of the graph in that precision."""
        opened = self._opened
        if opened is None:
            temperature = np.float32(self._manifest.calibration[precision]["temperature"])
            own, logits = outputs.probabilities, outputs.logits * temperature
            return self._judge.predictions(own, logits, options, self._watch)
        head, judge = opened
        logits = head.logits(outputs.embedding)
        return judge.predictions(head.probabilities(logits), logits, options, self._watch)

"""The values fitted after tuning, as `result.json` stores them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from capt_deploy.confidence.calibration import NONE, UNCALIBRATED, Calibration
from capt_deploy.evaluation.evaluate import ClassPair
from capt_train.calibrators import CALIBRATORS
from capt_train.method.class_rows import UNCHANGED, Outside
from capt_train.method.mixture import Mixture


@dataclass(frozen=True)
class Fitted:
    """Mixture, strength and calibration of a run, and its confused pairs."""

    pairs: Mapping[ClassPair, int]  # zero-shot confusions among the training images
    mixture: Mixture
    strength: float = 1.0  # κ of the visual side
    calibration: Calibration = UNCALIBRATED
    zero_shot_temperature: float = 1.0  # of the frozen model, for a fair comparison
    outside: Outside = UNCHANGED  # of classes without photos

    @property
    def temperature(self) -> float:
        """Return the temperature T of the tuned model."""
        return self.calibration.temperature

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            **{entry.name: getattr(self, entry.name) for entry in fields(self)},
            "pairs": [[true, taken, count] for (true, taken), count in self.pairs.items()],
            "mixture": self.mixture.to_dict(),
            "outside": vars(self.outside),
            "calibration": self.calibration.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], learned: int) -> "Fitted":
        """Read the JSON form.

        Args:
            values: as returned by `to_dict`.
            learned: number of learned prompts.

        Raises:
            TypeError, KeyError, ValueError, RunError: values of wrong form.
        """
        return cls(
            {(int(true), int(taken)): int(count) for true, taken, count in values["pairs"]},
            Mixture.from_dict(values["mixture"], learned),
            _strength(values["strength"]),
            _calibration(values),
            float(values["zero_shot_temperature"]),
            Outside(*(_finite(values["outside"][name]) for name in ("scale", "offset"))),
        )


def _calibration(values: Mapping[str, Any]) -> Calibration:
    calibration = Calibration.from_dict(values["calibration"])
    if calibration.calibrator not in (NONE, *CALIBRATORS):
        raise ValueError(f"calibration: unknown kind {calibration.calibrator!r}")
    return calibration


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"outside: expected a finite number, came {value!r}")
    return number


def _strength(value: Any) -> float:
    if not 0 <= float(value) <= 1:
        raise ValueError(f"strength: expected 0 to 1, came {value!r}")
    return float(value)

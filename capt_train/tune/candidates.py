"""Candidates for the text side: which of prompt, map and rows, and how strongly."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from capt_train.config import TrainConfig
from capt_train.method.class_map import SIDES
from capt_train.method.class_rows import UNJUDGED_WEIGHT
from capt_train.methods import METHODS
from capt_train.parts import PARTS
from capt_train.tune import fit_map

WEIGHTS = (0.05, 0.1, 0.2, 0.4, 1.0)  # α of the rows


@dataclass(frozen=True)
class Candidate:
    """One way to make the class rows."""

    prompt: bool = False  # with whatever else is trained by epochs
    side: str | None = None  # of the map; None without one
    ridge: float = 0.0
    weight: float = 0.0  # α of the rows; 0 without rows

    @property
    def family(self) -> tuple[str, ...]:
        """Return the parts in force."""
        used = {"prompt": self.prompt, "map": self.side is not None, "rows": self.weight > 0}
        return tuple(name for name, flag in used.items() if flag)

    def applied(self, config: TrainConfig) -> TrainConfig:
        """Return the settings of a run that trains this candidate."""
        dropped = {*choosable(config)} - {*self.family}
        changes: dict[str, Any] = {"without": (*config.without, *sorted(dropped))}
        if self.side is not None:
            changes |= {"map.side": self.side, "map.ridge": self.ridge}
        if self.weight:
            changes["rows.weight"] = self.weight
        return config.with_settings(changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Candidate":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        side = values["side"]
        if side is not None and side not in SIDES:
            raise ValueError(f"side: expected one of {SIDES}, came {side!r}")
        return cls(bool(values["prompt"]), side, float(values["ridge"]), float(values["weight"]))


def choosable(config: TrainConfig) -> frozenset[str]:
    """Return the parts that held-out photos decide about: the method's, if not pinned."""
    free = {*METHODS[config.method].chosen} & config.parts - {*config.added}
    beside = parts_by_epochs(config) - {"prompt"}  # trained together with the prompt
    return frozenset(free - {"prompt"} if beside else free)


def candidates(config: TrainConfig, *, judged: bool) -> list[Candidate]:
    """Return all candidates; families from simple to complex.

    Args:
        config: settings of the run; what they fix is no choice.
        judged: whether held-out photos of tuned classes can judge the weight of the rows.
    """
    free = choosable(config)
    prompts = [False, True] if "prompt" in free else [bool(parts_by_epochs(config))]
    maps: list[tuple[str | None, float]] = []
    if "map" not in config.parts or "map" in free:
        maps.append((None, 0.0))
    if "map" in config.parts:
        sides = [config.map.side] if config.map.side else SIDES
        ridges = fit_map.RIDGES if config.map.ridge is None else (config.map.ridge,)
        maps += [(side, ridge) for side in sides for ridge in ridges]
    weights: list[float] = []
    if "rows" not in config.parts or ("rows" in free and judged):
        weights.append(0.0)
    if "rows" in config.parts:
        usual = WEIGHTS if judged else (UNJUDGED_WEIGHT,)
        weights += usual if config.rows.weight is None else (config.rows.weight,)
    listed = [Candidate(p, s, r, w) for p in prompts for s, r in maps for w in weights]
    return sorted(listed, key=lambda one: _complexity(one.family))


def _complexity(family: tuple[str, ...]) -> tuple[int, ...]:
    """Order families by what they need: rows cost nothing, a prompt needs the text tower."""
    return tuple(int(name in family) for name in ("map", "prompt", "rows"))


def parts_by_epochs(config: TrainConfig) -> frozenset[str]:
    """Return the parts of the text side that are trained by epochs."""
    text = {name for name in config.parts if PARTS[name].side in ("prompt", "text")} - {"map"}
    return frozenset(text | config.parts & {"text-prompts"})


def folds_answer(config: TrainConfig) -> bool:
    """Tell whether a candidate on a fold is all that the run trains."""
    rows = {name for name in config.parts if PARTS[name].side == "rows"} - {"rows"}
    beyond = config.needs("teacher") or "image-prompt" in config.parts or config.visual.joint
    return not (rows or beyond)

"""All settings of a run; JSON on disk."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from capt_deploy.core.errors import CaptError, ConfigError
from capt_train.calibrators import CALIBRATORS
from capt_train.methods import METHODS
from capt_train.parts import GROUPS, PARTS, loss_terms, members
from capt_train.setting_groups import (
    CalibrationSettings,
    ConfusionSettings,
    DistillationSettings,
    ExpertSettings,
    MapSettings,
    MixtureSettings,
    PromptSettings,
    RowSettings,
    TuningSettings,
    VisualSettings,
)
from capt_train.settings import (
    Allowed,
    Setting,
    SettingsGroup,
    at_least,
    nearest,
    one_of,
    setting,
)

_SEED = Allowed("0 to 2**32 - 1", lambda seed: 0 <= seed < 2**32)


@dataclass(frozen=True)
class TrainConfig(SettingsGroup):
    """Everything that decides a run. `capt_train.run.setup` makes the paths absolute.

    A method with settings of its own, such as `coop-paper`, is chosen by `with_settings`.
    """

    data: str = setting(MISSING, "folder, .csv, .jsonl, or split_zhou_*.json", option="--data")
    model: str = setting(
        MISSING, "ViT-B-16-quickgelu, hf-hub:NAME, or local-dir:FOLDER", option="--model"
    )
    pretrained: str | None = setting(
        None, "weights: a tag of open_clip (openai) or a checkpoint", option="--pretrained"
    )
    class_names: str | None = setting(
        None, "JSON {label: name} or two-column CSV of names", option="--class-names"
    )
    method: str = setting("capt", "which parts are trained", one_of(METHODS), option="--method")
    added: tuple[str, ...] = setting((), "parts to add", option="--with")
    without: tuple[str, ...] = setting((), "parts to leave out", option="--without")
    classes: str = setting(
        "all",
        "with base, tune on the first half of the classes",
        one_of(("all", "base")),
        option="--classes",
    )
    shots: int | None = setting(
        None, "photos of each class to tune on [default: all]", at_least(1), "all", "--shots"
    )
    test_share: float = setting(
        0.0,
        "share of each class to keep for testing, where the data has no split of its own",
        Allowed("0 or more, below 1", lambda share: 0 <= share < 1),
        option="--test-share",
    )
    seed: int = setting(1, "seed of all random choices", _SEED, option="--seed")
    device: str = setting("auto", "where to tune: auto, cpu, cuda, cuda:1 …", option="--device")
    workers: int | None = setting(
        None, "threads that decode images [default: auto]", at_least(1), "auto", "--workers"
    )
    tuning: TuningSettings = field(default_factory=TuningSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    map: MapSettings = field(default_factory=MapSettings)
    rows: RowSettings = field(default_factory=RowSettings)
    confusion: ConfusionSettings = field(default_factory=ConfusionSettings)
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    visual: VisualSettings = field(default_factory=VisualSettings)
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    losses: Mapping[str, float] = field(default_factory=dict)  # weights; the rest by default

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "losses", {**default_losses(), **self.losses})
        known = settings()
        for name, value in self.losses.items():
            _known(f"losses.{name}", known).check(value)
        known_parts = (*PARTS, *GROUPS)
        for option, names in (("--with", self.added), ("--without", self.without)):
            for name in names:
                if name not in known_parts:
                    raise ConfigError(f"{option}: no part {name!r}; {nearest(name, known_parts)}")
        for name in self.added:
            if {*members([name])} <= {*members(self.without)}:
                raise ConfigError(f"--with {name}: --without takes it out again; drop one of them")
        self._check_together()

    def _check_together(self) -> None:
        """Raise a ConfigError for settings that do not go together."""
        confusion = self.confusion
        if bool(confusion.llm_url) != bool(confusion.llm_model):
            missing, given = ("url", "model") if confusion.llm_model else ("model", "url")
            raise ConfigError(f"--llm-{given}: expected --llm-{missing} beside it")
        if not self.needs("sentences"):
            for name in ("sentences", "commonality", "difference", "llm_url"):
                if getattr(confusion, name) is not None:
                    readers = ", ".join(part for part in PARTS if "sentences" in PARTS[part].needs)
                    raise ConfigError(
                        f"{settings()[f'confusion.{name}'].label}: nothing reads sentences; add "
                        f"--with {readers}, or leave it out"
                    )
        self._check_alternatives()
        teacher = self.distillation.teacher
        if self.needs("teacher") != (teacher is not None):
            found = "leave it out" if teacher else "expected a model or a run to learn from"
            raise ConfigError(f"--teacher: {found} with --method {self.method}")
        calibrator = self.calibration.calibrator
        if calibrator and CALIBRATORS[calibrator].needs_all_classes and self.classes == "base":
            raise ConfigError(
                "--set calibration.calibrator: expected another one with --classes base, because "
                f"{calibrator} has no factor for the classes that are not tuned on"
            )
        goals = {**self.loss_weights, "balance": 0.0}  # balance alone teaches nothing
        if self.parts and not any(goals.values()):
            raise ConfigError(f"--set losses: expected at least one above 0, came {goals!r}")

    def _check_alternatives(self) -> None:
        """Raise a ConfigError for parts of which a class can have only one."""
        for side in ("prompt", "rows"):
            rivals = [name for name in PARTS if name in self.parts and PARTS[name].side == side]
            if len(rivals) > 1:
                raise ConfigError(
                    f"parts {' and '.join(rivals)}: expected one of them, because each gives the "
                    f"{'class embeddings' if side == 'prompt' else 'class rows'}; leave the others "
                    "out with --without"
                )
        for name in PARTS:
            misfits = [other for other in PARTS[name].excludes if other in self.parts]
            if name in self.parts and misfits:
                raise ConfigError(
                    f"part {name}: expected without {', '.join(misfits)}; leave one of them out "
                    "with --without"
                )
        if self.visual.joint and (both := self.parts & {"map", "rows"}):
            raise ConfigError(
                f"--set visual.joint: expected without {' and '.join(sorted(both))}, which are "
                "chosen on embeddings of the frozen tower"
            )
        prompt = self.prompt
        single = [name for name in PARTS if name in self.parts and PARTS[name].single_prompt]
        if single and (prompt.count > 1 or prompt.class_specific):
            raise ConfigError(f"part {single[0]}: expected one context, the same for all classes")

    @property
    def parts(self) -> frozenset[str]:
        """Return the parts that are switched on; none for the method `zeroshot`."""
        return frozenset(
            {*METHODS[self.method].parts, *members(self.added)} - {*members(self.without)}
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        """Return the weights in force: 0 where a part is off, or another term replaces one."""
        off = [name for part in {*PARTS} - self.parts for name in PARTS[part].losses]
        terms = [term for part in self.parts for term in PARTS[part].losses.values()]
        replaced = [term.replaces for term in terms if term.replaces]
        return {**self.losses, **dict.fromkeys([*off, *replaced], 0.0)}

    def needs(self, prepared: str) -> bool:
        """Tell whether a part that is on needs something prepared, such as the `bank`."""
        return any(prepared in PARTS[name].needs for name in self.parts)

    def values(self) -> dict[str, Any]:
        """Return the JSON form of every setting by its name with the group."""
        return _flat(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self, dict_factory=_with_lists)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], error: type[CaptError]) -> "TrainConfig":
        """Read the JSON form.

        Raises:
            error: a key is unknown or missing, or a value cannot be used.
        """
        flat = _flat(values)
        if different := sorted({*flat} ^ {*settings()}):
            raise error(
                f"configuration: written by another version of capt (it differs in "
                f"{different[0]}, {len(different)} settings in all); tune again"
            )
        try:
            tuples = {name: tuple(v) for name, v in flat.items() if isinstance(v, list)}
            return cls(str(flat["data"]), str(flat["model"])).with_settings({**flat, **tuples})
        except ConfigError as cause:
            raise error(f"configuration: {cause}") from cause

    def with_settings(self, values: Mapping[str, Any]) -> "TrainConfig":
        """Return a copy with other values, given by names such as `tuning.epochs`.

        Text is read as the command line does it: `auto` or `none` for None, `true`, `0.001`.
        Another method brings the settings of its own, unless `values` has others.

        Raises:
            ConfigError: unknown name, or a value that cannot be used.
        """
        known, parsed = settings(), dict(values)
        for name, value in values.items():
            declared = _known(name, known)
            parsed[name] = declared.parse(value) if isinstance(value, str) else value
            declared.check(parsed[name])
        method = parsed.get("method", self.method)
        if method != self.method:
            for_whom = (parsed.get(name, getattr(self, name)) for name in ("shots", "classes"))
            parsed = {**METHODS[method].settings(*for_whom), **parsed}
        changes = defaultdict[str, dict[str, Any]](dict)
        for name, value in parsed.items():
            group, _, leaf = name.rpartition(".")
            changes[group][leaf] = value
        top = changes.pop("", {})
        for group, new in changes.items():
            old = getattr(self, group)
            top[group] = {**old, **new} if group == "losses" else replace(old, **new)
        return replace(self, **top)


def settings() -> Mapping[str, Setting]:
    """Return all settings of a run by name, group after group."""
    rows = [*TrainConfig.declared().values()]
    for entry in fields(TrainConfig):
        group = entry.default_factory
        if isinstance(group, type) and issubclass(group, SettingsGroup):
            rows += group.declared().values()
    for name, weight in default_losses().items():
        help = f"weight of: {loss_terms()[name].help}"
        rows.append(Setting(f"losses.{name}", float, weight, help, at_least(0)))
    return {row.name: row for row in rows}


def default_losses() -> dict[str, float]:
    """Return the default weight of every loss term."""
    terms = loss_terms().items()
    return {name: term.weight for name, term in terms if term.weight is not None}


def _known(name: str, known: Mapping[str, Setting]) -> Setting:
    if name not in known:
        raise ConfigError(f"--set: no setting {name!r}; {nearest(name, known)}")
    return known[name]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        group = value if isinstance(value, dict) else None
        flat |= {name: value} if group is None else {f"{name}.{k}": v for k, v in group.items()}
    return flat


def _with_lists(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}

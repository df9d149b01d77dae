"""The run folder: its files, how a run begins, and how a finished one is loaded."""

import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from capt_deploy.core.errors import RunError
from capt_deploy.core.files import expand_home, read_json, write_bytes, write_json
from capt_deploy.core.version import __version__
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.config import TrainConfig
from capt_train.data.fewshot import FewShotSplit
from capt_train.data.suspects import SUSPECTS
from capt_train.data.validation import VALIDATION, Validation
from capt_train.method.class_rows import ClassRows
from capt_train.method.learner import Learner, make_learner
from capt_train.method.visual_tuner import VisualTuner
from capt_train.run.colours import ColourFit
from capt_train.run.fitted import Fitted
from capt_train.tune.checkpoint import load_checkpoint
from capt_train.tune.choice import Choice
from capt_train.tune.stages import TEXT
from capt_train.tune.strength import Trial
from capt_train.tune.tune import BEST

CHOICE, OUT_OF_FOLD = "choice.json", "out_of_fold.safetensors"
CONFIG, SPLIT, RESULT, METRICS = "config.json", "split.json", "result.json", "metrics.json"
BANK, MATRIX = "bank.safetensors", "confusions.png"
COLOURS, TRIAL, README = "colours.json", "trial.json", "README.txt"
UNLABELLED = "unlabelled.json"
# What the README of each run says of its files.
FILES = {
    METRICS: "accuracy and calibration, zero-shot beside tuned",
    "confusions.json, confusions.png": "which classes are confused, before and after tuning",
    SUSPECTS: "labels that are probably wrong, and copies of photos",
    CONFIG: "all settings, versions, the model's fingerprint",
    SPLIT: "the chosen images with their hashes",
    CHOICE: "what was kept of prompt, map and rows, how each did, and the learning curve",
    OUT_OF_FOLD: "logits of the training images, each by a model that has not seen it",
    RESULT: "what was fitted after tuning: strength, mixture, calibration; history of the epochs",
    "best.safetensors, last.safetensors": "parameters of the best epoch; state after the last one",
    "text-*.safetensors": "the same of the text side, where a visual side follows",
    "validation.safetensors": "embeddings and labels of the held-out images, for the export",
    BANK: "the confusion bank after its last update",
    COLOURS: "the map of the input's colours, and how much zero-shot gains by it",
    UNLABELLED: "hashes of photos without labels and of a teacher's answers, for distillation",
    TRIAL: "the short trial of the visual side on half of the images, if there was one",
    "sentences.json, llm_answers.json": "sentences about confused pairs; answers of an LLM",
}
_Parsed = TypeVar("_Parsed")
_VERSIONED = ("torch", "open_clip_torch", "numpy", "pillow")


@dataclass(frozen=True)
class TunedModel:
    """A tuned model with everything fitted around it; the input of export and evaluation."""

    backbone: Backbone
    config: TrainConfig
    split: FewShotSplit
    learner: Learner  # its strength set
    # Ŵ_c = Σ_i π_i(c)·t̃_{i,c} of all class names of the data set, never renormalised; with α/scale
    # of the closed-form row, whose bias is beside it
    class_rows: ClassRows
    zero_shot: Float[Tensor, "classes dim"]  # hand-written t⁰, unit norm
    fitted: Fitted
    provenance: Mapping[str, Any]
    validation: Validation | None = None  # None where nothing was held out
    unlabelled: frozenset[str] = frozenset()  # hashes of photos that it learned without labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names in row order."""
        return self.split.class_names

    @property
    def tuned(self) -> tuple[bool, ...]:
        """Tell for each class whether it was tuned on."""
        return self.split.tuned_flags

    def outside_rows(self, texts: Float[Tensor, "classes dim"]) -> Float[Tensor, "classes dim"]:
        """Return the rows of classes without photos from their mixed embeddings Ŵ_c."""
        return self.fitted.outside.texts(texts, self.centre)

    @property
    def centre(self) -> Float[Tensor, " dim"]:
        """Return the mean Ŵ_c of the tuned classes, closed-form rows not included."""
        tuned = list(self.split.tuned)
        mixed = self.fitted.mixture.rows(
            all_texts(self.learner, self.zero_shot)[:, tuned], [True] * len(tuned)
        )
        return mixed.mean(dim=0)

    @property
    def visual(self) -> VisualTuner | None:
        """Return the trained part of the vision tower; None where nothing is trained there."""
        return self.learner.visual

    @property
    def moves_images(self) -> bool:
        """Tell whether image embeddings differ from the frozen model's."""
        return self.visual is not None or self.learner.recoloured

    def logits(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Return calibrated logits z/T of tuned image embeddings, z = scale·f·Ŵ_c + b_c + bias.

        With vector scaling they are (a·z + b)/T. The top-label map is not applied.
        """
        logits, vector = self.raw_logits(embeddings), self.fitted.calibration.vector
        if vector is not None:
            scales, biases = map(logits.new_tensor, (vector.scales, vector.biases))
            logits = logits * scales + biases
        return logits / self.fitted.temperature

    def raw_logits(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Return uncalibrated logits z of tuned image embeddings."""
        if self.learner.obstacle is None:
            return self._logits(embeddings, self.class_rows)
        logits = self.learner.logits(embeddings, range(len(self.class_names)))
        return logits + self.backbone.logit_bias

    def zero_shot_logits(
        self, embeddings: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch classes"]:
        """Return the frozen model's logits (scale·f⁰·t⁰_c + bias)/T⁰ of its image embeddings."""
        frozen = ClassRows.from_texts(self.zero_shot)
        return self._logits(embeddings, frozen) / self.fitted.zero_shot_temperature

    def _logits(self, embeddings: Tensor, rows: ClassRows) -> Tensor:
        return rows.logits(embeddings, self.backbone.scale) + self.backbone.logit_bias


def begin(folder: Path, config: TrainConfig, model_fingerprint: str) -> None:
    """Write `config.json`, which makes the folder a run, and a README of its files.

    A resumed run may have moved; it keeps the versions that it began with.
    """
    versions = {name: metadata.version(name) for name in _VERSIONED}
    versions = {"capt": __version__, "python": platform.python_version(), **versions}
    if (folder / CONFIG).exists():
        versions = read_config(folder)[1].get("versions", versions)
    write_json(
        folder / CONFIG,
        {
            "config": config.to_dict(),
            "parts": sorted(config.parts),  # a later version may change those of a method
            "model_sha256": model_fingerprint,
            "versions": versions,
        },
    )
    lines = ["A run of capt-train. Its files, as far as the run has them:", ""]
    lines += [f"{name}\n    {content}" for name, content in FILES.items()]
    write_bytes(folder / README, "\n".join([*lines, ""]).encode())


def read_config(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Return a run's settings and the whole of its `config.json`.

    Raises:
        RunError: the folder is not a run, or was written by another version.
    """
    if not (folder / CONFIG).is_file():
        raise RunError(
            f"{folder}: no run ({CONFIG} is missing); expected a folder written by capt-train"
        )
    content = read_json(folder / CONFIG, RunError)
    settings = content.get("config") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or "model_sha256" not in content:
        raise RunError(f"{folder / CONFIG}: not as capt-train writes it")
    config = TrainConfig.from_dict(settings, RunError)
    if content.get("parts") not in (None, sorted(config.parts)):
        raise RunError(
            f"{folder}: begun with {', '.join(content['parts'])}, but the method {config.method} "
            f"of this version trains {', '.join(sorted(config.parts))}; tune again"
        )
    return config, content


def load_run(folder: str | Path, device: torch.device | None = None) -> TunedModel:
    """Load a finished run.

    Raises:
        RunError: the folder is not a run, tuning has not ended, or the model has changed.
        ModelError: the model cannot be loaded.
    """
    folder = expand_home(folder)
    config, written = read_config(folder)
    if not (folder / RESULT).is_file():
        raise RunError(f"{folder}: tuning has not ended; continue with capt-train --resume")
    split = FewShotSplit.load(folder / SPLIT)
    backbone = load_backbone(config.model, config.pretrained, device or torch.device("cpu"))
    fingerprint = backbone.fingerprint()
    if fingerprint != written["model_sha256"]:
        raise RunError(
            f"{folder}: tuned on a model with SHA-256 {written['model_sha256'][:12]}…, but "
            f"{config.model} now has {fingerprint[:12]}…; restore that model or tune again"
        )
    zero_shot = backbone.class_embeddings(split.class_names, config.prompt.templates)
    choice = read_choice(folder)
    if choice is not None:
        config = choice.chosen.applied(config)
    colours = read_colours(folder).colours if "colours" in config.parts else None
    learner = make_learner(backbone.recoloured(colours), config, split, zero_shot)
    fitted = _read(folder / RESULT, lambda values: Fitted.from_dict(values, learner.learned))
    vector = fitted.calibration.vector
    if vector is not None and len(vector.scales) != len(split.class_names):
        raise RunError(
            f"{folder / RESULT}: expected vector scaling of {len(split.class_names)} classes, "
            f"came {len(vector.scales)}; restore the file, or tune again"
        )
    learner.set_strength(fitted.strength)
    if learner.trainable:
        load_checkpoint(best_checkpoint(folder), learner)
    provenance = {
        **config.to_dict(),
        "data_fingerprint": split.fingerprint(),
        "model_sha256": fingerprint,
        "versions": written.get("versions", {}),
        "choice": choice and choice.to_dict(),
    }
    rows = mixed_rows(learner, zero_shot, split, fitted)
    validation = Validation.load(folder / VALIDATION)
    if validation is not None and not validation.fits(zero_shot.shape[1], split.tuned):
        raise RunError(f"{folder / VALIDATION}: of another run; restore it, or delete it")
    return TunedModel(
        backbone,
        config,
        split,
        learner,
        rows,
        zero_shot,
        fitted,
        provenance,
        validation,
        read_unlabelled(folder),
    )


def best_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the best epoch of the last stage."""
    text = folder / f"{TEXT}{BEST}"
    return folder / BEST if (folder / BEST).exists() else text


def read_colours(folder: Path) -> ColourFit:
    """Return the fitted colour map of a run, from `colours.json`.

    Raises:
        RunError: the file is missing or malformed.
    """
    if not (folder / COLOURS).is_file():
        raise RunError(f"{folder / COLOURS}: missing; restore it or tune again")
    return _read(folder / COLOURS, ColourFit.from_dict)


def write_choice(folder: Path, choice: Choice) -> None:
    """Write `out_of_fold.safetensors` and, last, `choice.json`."""
    rows = {"logits": choice.out_of_fold.contiguous(), "rows": choice.judging.contiguous()}
    write_bytes(folder / OUT_OF_FOLD, save(rows))
    write_json(folder / CHOICE, choice.to_dict())


def read_choice(folder: Path) -> Choice | None:
    """Return the choice of a run; None where the settings left nothing to decide.

    Raises:
        RunError: a file is missing or malformed.
    """
    if not (folder / CHOICE).exists():
        return None
    try:
        content = load((folder / OUT_OF_FOLD).read_bytes())
        logits, rows = content["logits"], content.get("rows")
    except (OSError, SafetensorError, KeyError) as cause:
        raise RunError(f"{folder / OUT_OF_FOLD}: damaged ({cause!r}); tune again") from cause
    if rows is None:  # older runs have a row for each training image, of NaN where none judged it
        rows = (~logits.isnan().any(dim=1)).nonzero().squeeze(1)
        logits = logits[rows]
    return _read(folder / CHOICE, lambda values: Choice.from_dict(values, logits, rows))


def keep_unlabelled(folder: Path, photos: Collection[str], answers: str) -> None:
    """Write the hashes of the photos that the run learns without labels, and of the answers.

    Raises:
        RunError: the run was begun with others.
    """
    content = {"photos": sorted(photos), "answers": answers}
    path = folder / UNLABELLED
    if path.exists() and read_json(path, RunError) != content:
        raise RunError(
            f"{folder}: was begun with other photos without labels, or with another teacher"
        )
    write_json(path, content)


def read_unlabelled(folder: Path) -> frozenset[str]:
    """Return the hashes of the photos that the run has learned without labels; often none.

    Raises:
        RunError: the file is malformed.
    """
    path = folder / UNLABELLED
    if not path.exists():
        return frozenset()
    return _read(path, lambda values: frozenset(map(str, values["photos"])))


def read_trial(folder: Path) -> Trial | None:
    """Return the trial of a run, from `trial.json`; None where no trial was possible.

    Raises:
        RunError: the file is missing or malformed.
    """
    return _read(folder / TRIAL, lambda values: Trial.from_dict(values) if values else None)


def _read(path: Path, parse: Callable[[Any], _Parsed]) -> _Parsed:
    content = read_json(path, RunError)
    try:
        return parse(content)
    except (TypeError, KeyError, ValueError, RunError) as cause:
        raise RunError(f"{path}: not as capt-train writes it ({cause!r})") from cause


@torch.no_grad()
def all_texts(
    learner: Learner, zero_shot: Float[Tensor, "classes dim"]
) -> Float[Tensor, "prompts classes dim"]:
    """Return the hand-written embeddings of all classes, followed by the learned ones."""
    learned = learner.texts(range(len(zero_shot))).embeddings
    return torch.cat([zero_shot[None], learned])


def mixed_rows(
    learner: Learner,
    zero_shot: Float[Tensor, "classes dim"],
    split: FewShotSplit,
    fitted: Fitted,
) -> ClassRows:
    """Return the mixed rows Ŵ_c of all classes, closed-form rows included (METHOD 9)."""
    mixed = fitted.mixture.rows(all_texts(learner, zero_shot), split.tuned_flags)
    rows = fitted.outside.applied(ClassRows.from_texts(mixed), split.tuned_flags)
    return learner.with_rows(rows, range(len(mixed)))

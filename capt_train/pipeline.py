"""The whole of `capt-train`: data, features, zero-shot, tuning, calibration, metrics."""

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from capt_deploy.console import say
from capt_deploy.datasets import Dataset, read_dataset
from capt_deploy.errors import ConfigError, RunError
from capt_deploy.evaluation import Pair, Report
from capt_deploy.files import expand_home, write_json
from capt_train import run as runs
from capt_train.backbone import Backbone, choose_device, load_backbone
from capt_train.calibration import fit_temperature
from capt_train.checkpoint import TuningState
from capt_train.config import TrainConfig
from capt_train.embedding_cache import EmbeddingCache
from capt_train.evaluate import evaluate_model
from capt_train.features import Features, embed
from capt_train.fewshot import FewShotSplit, choose
from capt_train.prompt import PromptLearner
from capt_train.run import TunedModel
from capt_train.tuning import TuningTask, tune

# Where things lie may change before a run is resumed: what is there is checked by its content.
_MAY_MOVE = {"data", "model", "pretrained", "class_names", "device"}
_FEW_FOR_CALIBRATION = 50


@dataclass(frozen=True)
class _Setup:
    """A run that is ready to be tuned: everything is loaded and checked, the folder is begun."""

    out: Path
    config: TrainConfig
    dataset: Dataset
    split: FewShotSplit
    backbone: Backbone
    model_sha256: str
    zero_shot: Float[Tensor, "classes dim"]
    prompt: PromptLearner | None  # none with the method zeroshot


def train(
    config: TrainConfig, out: str | Path, *, resume: bool = False, split_from: Path | None = None
) -> Report:
    """Tune a prompt and write a run folder.

    Args:
        config: all settings.
        out: the run folder; a new or empty one, or with `resume` that of an interrupted run.
        resume: continue; the result has the bits of an uninterrupted run.
        split_from: another run whose chosen images are used again; its choice replaces
            `classes` and `shots`, while `seed` still decides the rest.

    Returns:
        What `metrics.json` holds: accuracy and calibration, zero-shot beside tuned.

    Raises:
        CaptError: the data, the model, the settings or the folder cannot be used.
    """
    out = expand_home(out)
    with runs.locked(out):
        setup = _prepare(config, out, resume, split_from)
        with closing(EmbeddingCache(setup.model_sha256, setup.backbone.device.type)) as cache:
            model, images = _tune(setup, cache)
            report = {**_measure(setup, model, cache), "images": images}
        write_json(setup.out / runs.METRICS, report)
    return report


def _prepare(config: TrainConfig, out: Path, resume: bool, split_from: Path | None) -> _Setup:
    """Load and check everything; only then begin the folder."""
    config = _absolute(config)
    if split_from is not None:
        if resume:
            raise ConfigError("--split-from: a resumed run has its images already; leave it out")
        theirs, _ = runs.read_config(split_from)
        config = replace(config, classes=theirs.classes, shots=theirs.shots)
    _check_folder(out, config, resume)
    device = choose_device(config.device)
    dataset = read_dataset(config.data, config.class_names)
    begun = (out / runs.CONFIG).exists()
    if begun or split_from is not None:
        split = FewShotSplit.load((split_from or out) / runs.SPLIT)
        split.check(dataset)
    else:
        split = choose(dataset, config.classes, config.shots, config.seed)
    for notice in split.notices:
        say(f"note: {notice}")
    backbone = load_backbone(config.model, config.pretrained, device)
    fingerprint = backbone.fingerprint()
    zero_shot = backbone.class_embeddings(split.class_names, config.templates)
    prompt = None
    if config.method != "zeroshot":
        prompt = runs.make_prompt(backbone, config, split)
    if begun:
        _check_model(out, fingerprint)
    else:
        split.save(out / runs.SPLIT)
    runs.begin(out, config, fingerprint)  # a resumed run may have moved
    return _Setup(out, config, dataset, split, backbone, fingerprint, zero_shot, prompt)


def _tune(setup: _Setup, cache: EmbeddingCache) -> tuple[TunedModel, dict[str, int]]:
    """Tune, calibrate, and write `result.json`; return also how many images were used for what."""
    backbone, split, config = setup.backbone, setup.split, setup.config
    train_features = embed(backbone, cache, setup.dataset, split.train, "training images")
    val = embed(backbone, cache, setup.dataset, split.val, "validation images")
    tuned = list(split.tuned)
    reference = setup.zero_shot[tuned]
    state = TuningState()
    if setup.prompt is not None:
        task = TuningTask(backbone.scale, split.tuned, train_features, val, reference, config)
        state = tune(setup.prompt, task, setup.out)
    pairs = mine_pairs(train_features, reference, tuned)
    embeddings = runs.all_embeddings(setup.prompt, setup.zero_shot)
    fitted = runs.Fitted(pairs)
    model = TunedModel(backbone, config, split, embeddings, setup.zero_shot, fitted, {})
    if 0 < len(val) < _FEW_FOR_CALIBRATION:
        say(f"note: confidences are calibrated on no more than {len(val)} validation images")
    if len(val):
        labels = val.labels_among(tuned)
        after, before = model.logits(val.embeddings), model.zero_shot_logits(val.embeddings)
        fitted = runs.Fitted(
            pairs,
            fit_temperature(after[:, tuned].cpu(), labels),
            fit_temperature(before[:, tuned].cpu(), labels),
        )
        model = replace(model, fitted=fitted)
    images = {"train": len(train_features), "val": len(val)}
    write_json(
        setup.out / runs.RESULT,
        {
            "temperature": model.fitted.temperature,
            "zero_shot_temperature": model.fitted.zero_shot_temperature,
            "images": images,
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "history": state.history,
            "pairs": [[true, predicted, count] for (true, predicted), count in pairs.items()],
        },
    )
    return model, images


def _measure(setup: _Setup, model: TunedModel, cache: EmbeddingCache) -> Report:
    """Evaluate on test images, or on the best that there is, and say so."""
    splits = {**setup.dataset.splits, "val": setup.dataset.splits["val"] or setup.split.val}
    measured_on = next(name for name in ("test", "val", "train") if splits[name])
    if measured_on != "test":
        say(f"note: no test images: measured on {measured_on} images, which the run has used")
    dataset = replace(setup.dataset, splits=splits)
    return {
        "split": measured_on,
        "method": setup.config.method,
        "shots": setup.config.shots,
        "seed": setup.config.seed,
        "temperature": model.fitted.temperature,
        **evaluate_model(model, cache, dataset, measured_on),
    }


def mine_pairs(train: Features, reference: torch.Tensor, tuned: list[int]) -> dict[Pair, int]:
    """Count which class the zero-shot model takes for which among the training images."""
    predicted = (train.embeddings.to(reference) @ reference.T).argmax(dim=1).tolist()
    pairs = zip(train.labels.tolist(), (tuned[own] for own in predicted), strict=True)
    return dict(sorted(Counter((true, taken) for true, taken in pairs if true != taken).items()))


def _absolute(config: TrainConfig) -> TrainConfig:
    """Make paths independent of the folder the command was started in."""
    changes: dict[str, Any] = {"data": str(expand_home(config.data).resolve())}
    if config.class_names is not None:
        changes["class_names"] = str(expand_home(config.class_names).resolve())
    folder = expand_home(config.model.removeprefix("local-dir:"))
    # any other folder may just be called like an architecture, as a run folder may
    if config.model.startswith("local-dir:") or (folder / "open_clip_config.json").is_file():
        changes["model"] = f"local-dir:{folder.resolve()}"
    if config.pretrained is not None and expand_home(config.pretrained).is_file():
        changes["pretrained"] = str(expand_home(config.pretrained).resolve())
    return replace(config, **changes)


def _check_folder(out: Path, config: TrainConfig, resume: bool) -> None:
    if not (out / runs.CONFIG).exists():
        if resume:
            raise RunError(f"{out}: nothing to resume ({runs.CONFIG} is missing)")
        # split.json and hidden temporary files are what a kill during the first writes leaves
        if out.exists() and (not out.is_dir() or any(_is_foreign(file) for file in out.iterdir())):
            raise RunError(f"{out}: already there and no run; choose another --out")
        return
    if not resume:
        raise RunError(f"{out}: holds a run; continue it with --resume, or choose another --out")
    written, _ = runs.read_config(out)
    was, now = written.to_dict(), config.to_dict()
    different = [
        f"{key} {was[key]!r} → {now[key]!r}"
        for key in was
        if was[key] != now[key] and key not in _MAY_MOVE
    ]
    if different:
        raise RunError(f"{out}: was begun with other settings: {'; '.join(different)}")


def _is_foreign(file: Path) -> bool:
    return file.name != runs.SPLIT and not (file.name[0] == "." and file.suffix == ".tmp")


def _check_model(out: Path, fingerprint: str) -> None:
    _, content = runs.read_config(out)
    if content["model_sha256"] != fingerprint:
        raise RunError(f"{out}: was begun with another model than the one that is there now")

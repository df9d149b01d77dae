"""The whole of `capt-train`: data, features, zero-shot, tuning, calibration, metrics."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capt_deploy.console import say
from capt_deploy.datasets import Dataset, read_dataset
from capt_deploy.errors import RunError
from capt_deploy.evaluation import Pair, Report
from capt_deploy.files import write_json
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
from capt_train.tuning import TuningTask, tune


def train(
    config: TrainConfig, out: str | Path, *, resume: bool = False, split_from: Path | None = None
) -> Report:
    """Tune a prompt and write a run folder.

    Args:
        config: all settings.
        out: the run folder; a new or empty one, or with `resume` that of an interrupted run.
        resume: continue; the result has the bits of an uninterrupted run.
        split_from: another run whose chosen images are used again.

    Returns:
        What `metrics.json` holds: accuracy and calibration, zero-shot beside tuned.

    Raises:
        CaptError: the data, the model, the settings or the folder cannot be used.
    """
    out = Path(out)
    config = _absolute(config)
    _check_folder(out, config, resume)
    device = choose_device(config.device)
    dataset = read_dataset(config.data, config.class_names)
    split = _split(dataset, config, out, split_from)
    for notice in split.notices:
        say(f"note: {notice}")
    backbone = load_backbone(config.model, config.pretrained, device)
    fingerprint = backbone.fingerprint()
    # Both refuse names that are too long, so they come before anything is written.
    zero_shot = backbone.class_embeddings(split.class_names, config.templates)
    prompt = None
    if config.method != "zeroshot":
        prompt = runs.make_prompt(backbone, config, split)
    if (out / runs.CONFIG).exists():
        _check_model(out, fingerprint)
    else:
        try:
            split.save(out / runs.SPLIT)
            runs.begin(out, config, fingerprint)
        except OSError as cause:
            raise RunError(f"{out}: cannot be written ({cause})") from cause
    cache = EmbeddingCache(fingerprint)
    try:
        return _train(config, out, dataset, split, backbone, cache, zero_shot, prompt)
    finally:
        cache.close()


def _train(
    config: TrainConfig,
    out: Path,
    dataset: Dataset,
    split: FewShotSplit,
    backbone: Backbone,
    cache: EmbeddingCache,
    zero_shot: torch.Tensor,
    prompt: PromptLearner | None,
) -> Report:
    train_features = embed(backbone, cache, dataset, split.train, "training images")
    val = embed(backbone, cache, dataset, split.val, "validation images")
    tuned = list(split.tuned)
    reference = zero_shot[tuned]
    state = TuningState()
    if prompt is not None:
        task = TuningTask(backbone.scale, split.tuned, train_features, val, reference, config)
        state = tune(prompt, task, out)
    pairs = mine_pairs(train_features, reference, tuned)
    model = runs.tuned_model(backbone, config, split, prompt, 1.0, pairs, {})
    if len(val):
        labels = torch.searchsorted(torch.tensor(tuned), val.labels)
        temperature = fit_temperature(model.logits(val.embeddings)[:, tuned].cpu(), labels)
        model = replace(model, temperature=temperature)
    write_json(
        out / runs.RESULT,
        {
            "temperature": model.temperature,
            "calibrated_on": len(val),
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "history": state.history,
            "pairs": [[true, predicted, count] for (true, predicted), count in pairs.items()],
        },
    )
    splits = {**dataset.splits, "val": dataset.splits["val"] or split.val}
    measured_on = next(name for name in ("test", "val", "train") if splits[name])
    if measured_on != "test":
        say(f"note: no test images: measured on {measured_on} images, which the run has used")
    report = {
        "split": measured_on,
        "method": config.method,
        "shots": config.shots,
        "seed": config.seed,
        "temperature": model.temperature,
        **evaluate_model(model, cache, replace(dataset, splits=splits), measured_on),
    }
    write_json(out / runs.METRICS, report)
    return report


def mine_pairs(train: Features, reference: torch.Tensor, tuned: list[int]) -> dict[Pair, int]:
    """Count which class the zero-shot model takes for which among the training images."""
    predicted = (train.embeddings.to(reference) @ reference.T).argmax(dim=1).tolist()
    pairs = zip(train.labels.tolist(), (tuned[own] for own in predicted), strict=True)
    return dict(sorted(Counter((true, taken) for true, taken in pairs if true != taken).items()))


def _absolute(config: TrainConfig) -> TrainConfig:
    """Make paths independent of the folder the command was started in."""
    changes: dict[str, Any] = {"data": str(Path(config.data).expanduser().resolve())}
    if config.class_names is not None:
        changes["class_names"] = str(Path(config.class_names).expanduser().resolve())
    folder = Path(config.model.removeprefix("local-dir:")).expanduser()
    # any other folder may just be called like an architecture, as a run folder may
    if config.model.startswith("local-dir:") or (folder / "open_clip_config.json").is_file():
        changes["model"] = f"local-dir:{folder.resolve()}"
    if config.pretrained is not None and Path(config.pretrained).is_file():
        changes["pretrained"] = str(Path(config.pretrained).resolve())
    return replace(config, **changes)


def _check_folder(out: Path, config: TrainConfig, resume: bool) -> None:
    if not (out / runs.CONFIG).exists():
        if resume:
            raise RunError(f"{out}: nothing to resume ({runs.CONFIG} is missing)")
        # split.json alone is what a kill between the first two writes leaves
        if out.exists() and (not out.is_dir() or {f.name for f in out.iterdir()} - {runs.SPLIT}):
            raise RunError(f"{out}: already there and no run; choose another --out")
        return
    if not resume:
        raise RunError(f"{out}: holds a run; continue it with --resume, or choose another --out")
    written, _ = runs.read_config(out)
    was, now = written.to_dict(), config.to_dict()
    different = [f"{key} {was[key]!r} → {now[key]!r}" for key in was if was[key] != now[key]]
    if different:
        raise RunError(f"{out}: was begun with other settings: {'; '.join(different)}")


def _check_model(out: Path, fingerprint: str) -> None:
    _, content = runs.read_config(out)
    if content["model_sha256"] != fingerprint:
        raise RunError(f"{out}: was begun with another model than the one that is there now")


def _split(
    dataset: Dataset, config: TrainConfig, out: Path, split_from: Path | None
) -> FewShotSplit:
    if (out / runs.CONFIG).exists():
        split = FewShotSplit.load(out / runs.SPLIT)
    elif split_from is not None:
        split = FewShotSplit.load(split_from / runs.SPLIT if split_from.is_dir() else split_from)
    else:
        return choose(dataset, config.classes, config.shots, config.seed)
    split.check(dataset)
    return split

"""Evaluate a tuned model in torch, as it was trained; the bundle's twin is `export.evaluate`."""

from pathlib import Path

import torch

from capt_deploy.console import say
from capt_deploy.datasets import Dataset, read_dataset
from capt_deploy.evaluation import Report, Scores, evaluate
from capt_train.backbone import choose_device
from capt_train.embedding_cache import EmbeddingCache
from capt_train.features import Features, embed
from capt_train.run import TunedModel, load_run


def model_scores(model: TunedModel, features: Features) -> Scores:
    """Return tuned and zero-shot logits of embedded images."""
    return Scores(
        features.labels.numpy(),
        model.logits(features.embeddings).cpu().numpy(),
        model.zero_shot_logits(features.embeddings).cpu().numpy(),
    )


@torch.no_grad()
def evaluate_model(
    model: TunedModel,
    cache: EmbeddingCache,
    dataset: Dataset,
    split: str,
    scope: str | None = None,
) -> Report:
    """Return the report of `capt-eval` for one split, uncalibrated figures included."""
    features = embed(model.backbone, cache, dataset, dataset.items(split), f"{split} images")
    scores = model_scores(model, features)
    report = evaluate(scores, model.class_names, model.tuned, model.pairs, scope)
    raw = Scores(scores.labels, scores.tuned * model.temperature, scores.zero_shot)
    uncalibrated = evaluate(raw, model.class_names, model.tuned, model.pairs, scope)
    keys = ("base", "new", "all")
    report["uncalibrated"] = {key: uncalibrated[key] for key in keys}
    report["skipped"] = [[file.path, file.reason] for file in features.skipped]
    return report


def evaluate_run(
    run: str | Path,
    data: str | Path,
    split: str = "test",
    scope: str | None = None,
    class_names: Path | None = None,
) -> Report:
    """Evaluate a finished run on a data set that has its class names.

    Raises:
        CaptError: the run or the data cannot be used.
    """
    model = load_run(run, choose_device("auto"))
    dataset = read_dataset(data, class_names or model.config.class_names)
    dataset = dataset.aligned_to(model.class_names)
    used = set(model.split.sha256)
    seen = sum(item.path in used for item in dataset.items(split)) if split == "test" else 0
    if seen:
        say(f"note: {seen} of the test images were tuned on; the figures are too good")
    cache = EmbeddingCache(str(model.provenance["model_sha256"]))
    try:
        return evaluate_model(model, cache, dataset, split, scope)
    finally:
        cache.close()

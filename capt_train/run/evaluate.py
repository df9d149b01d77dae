"""Evaluate a tuned model in torch, as it was trained."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from capt_deploy.core.console import say
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import expand_home, sha256_file
from capt_deploy.data.datasets import Dataset, Skipped, read_dataset
from capt_deploy.evaluation.evaluate import Report, Scores, evaluate
from capt_train.clip.loading import choose_device
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed
from capt_train.data.fewshot import FewShotSplit
from capt_train.run.folder import TunedModel, load_run

_AT_ONCE = 1024  # images


@dataclass(frozen=True)
class RunScores:
    """The scores of a tuned model on labelled images."""

    model: TunedModel
    scores: Scores
    root: Path  # of the data set
    files: tuple[Path, ...]  # in the order of the scores
    skipped: tuple[Skipped, ...]
    seen: int = 0  # number of test images that the run has used
    transductive: int = 0  # number of test images that it has learned without labels

    def report(self, scope: str | None = None) -> Report:
        """Return the report of `capt-eval`; see `evaluate`."""
        model = self.model
        report = evaluate(self.scores, model.class_names, model.tuned, model.fitted.pairs, scope)
        report["skipped"] = [[file.path, file.reason] for file in self.skipped]
        report["transductive"] = self.transductive
        return report


@torch.no_grad()
def score_model(
    model: TunedModel, cache: EmbeddingCache, dataset: Dataset, split: str
) -> RunScores:
    """Return a tuned model's scores on the images of a split.

    Raises:
        DataError: none of its images can be read.
    """
    items = dataset.items(split)
    workers = model.config.workers
    features = embed(model.backbone, cache, dataset, items, f"{split} images", workers=workers)
    if not len(features):
        raise DataError(f"{dataset.root}: none of the {len(items)} {split} images is readable")
    seen = transductive = 0
    if split == "test":
        used = set(model.split.sha256.values())
        if transductive := sum(digest in model.unlabelled for digest in features.sha256):
            say(
                f"note: transductive: {transductive} test images are among the photos that the run "
                "has learned without labels"
            )
        if seen := sum(digest in used for digest in features.sha256):
            say(f"note: {seen} test images are also among those that the run has used")
        if seen == len(features):
            say("WARNING: all of them: the figures say nothing about new photos")
    embeddings = features.embeddings
    if model.moves_images:
        encode, label = model.learner.image_embeddings, f"{split} images as tuned"
        embeddings = embed(model.backbone, None, dataset, items, label, encode, workers).embeddings
    fitted = model.fitted
    scores = Scores(
        features.labels.numpy(),
        _by_parts(model.logits, embeddings, folds=model.learner.obstacle is None),
        _by_parts(model.zero_shot_logits, features.embeddings),
        fitted.calibration,
        fitted.zero_shot_temperature,
    )
    files = tuple(dataset.path(item) for item in features.kept(items))
    return RunScores(model, scores, dataset.root, files, features.skipped, seen, transductive)


def _by_parts(
    logits: Callable[[Tensor], Tensor], embeddings: Float[Tensor, "images dim"], folds: bool = True
) -> NDArray[np.float32]:
    """Return the logits of images, (images, classes); what lies between needs less memory so.

    A model that does not fold encodes the class names in each call, so it gets all images at once.
    """
    parts = embeddings.split(_AT_ONCE if folds else max(1, len(embeddings)))
    return torch.cat([logits(part).cpu() for part in parts]).numpy()


def evaluate_run(
    run: str | Path,
    data: str | Path,
    split: str = "test",
    scope: str | None = None,
    class_names: Path | None = None,
) -> Report:
    """Return the report of a finished run on a data set with its class names.

    Raises:
        CaptError: the run or the data cannot be used.
    """
    return score_run(run, data, split, class_names).report(scope)


def score_run(
    run: str | Path, data: str | Path, split: str = "test", class_names: Path | None = None
) -> RunScores:
    """Return a finished run's scores on a split of a data set with its class names.

    Raises:
        CaptError: the run or the data cannot be used.
    """
    model = load_run(run, choose_device("auto"))
    # Without a split all photos are for testing; of the run's own, those that it kept for it
    share = (model.config.test_share if _holds_photos(Path(data), model.split) else 0) or 1.0
    names = class_names or model.config.class_names
    dataset = read_dataset(data, names, model.class_names, test_share=share)
    fingerprint = str(model.provenance["model_sha256"])
    with closing(EmbeddingCache(fingerprint, model.backbone.device.type)) as cache:
        scored = score_model(model, cache, dataset, split)
    return replace(scored, skipped=(*dataset.skipped, *scored.skipped))


def _holds_photos(data: Path, split: FewShotSplit) -> bool:
    """Tell whether a data set holds a photo that a run was tuned on."""
    root = expand_home(data)
    root = root if root.is_dir() else root.parent
    files = ((root / item.path, split.sha256[item.path]) for item in split.train)
    return any(file.is_file() and sha256_file(file) == digest for file, digest in files)

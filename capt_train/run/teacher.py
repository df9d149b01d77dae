"""The teacher of a distilled run, and its answers to photos without labels."""

import hashlib
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from capt_deploy.core.console import counted, say
from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.core.files import expand_home
from capt_deploy.data.datasets import Dataset, Item
from capt_deploy.data.folders import images_below
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import Features, embed
from capt_train.run import folder as runs
from capt_train.run.setup import Setup
from capt_train.tune.stages import TuningTask, zero_shot_bank


@dataclass(frozen=True)
class Teacher:
    """A model that answers for the classes of a run."""

    backbone: Backbone
    texts: Float[Tensor, "classes width"]  # unit norm
    run: runs.TunedModel | None = None
    places: tuple[int, ...] = ()  # of the classes among those of the run

    def answers(
        self, setup: Setup, photos: Dataset
    ) -> tuple[Features, Float[Tensor, "images classes"]]:
        """Return the embedded photos, and the teacher's probabilities."""
        run = self.run
        encode = None if run is None or not run.moves_images else run.learner.image_embeddings
        device = self.backbone.device.type
        with closing(EmbeddingCache(self.backbone.fingerprint(), device)) as cache:
            features = embed(
                self.backbone,
                None if encode else cache,
                photos,
                photos.splits["train"],
                "photos by the teacher",
                encode,
                setup.config.workers,
            )
        if run is None:
            images = features.embeddings.to(self.texts)
            logits = self.backbone.scale * images @ self.texts.T
        else:
            logits = run.logits(features.embeddings)[:, list(self.places)]
        return features, logits.softmax(dim=1).cpu()


def load_teacher(setup: Setup) -> Teacher:
    """Load the teacher of the settings.

    Raises:
        CaptError: it cannot be loaded, or does not know a class.
    """
    config, names = setup.config.distillation, setup.split.class_names
    source, device = str(config.teacher), setup.backbone.device
    if (expand_home(source) / runs.CONFIG).is_file():
        run = runs.load_run(source, device)
        if unknown := [name for name in names if name not in run.class_names]:
            raise ConfigError(
                f"--teacher {source}: expected a run with all class names of the data, came one "
                f"without {unknown[:5]}"
            )
        places = tuple(run.class_names.index(name) for name in names)
        texts = functional.normalize(run.class_rows.subset(places).rows, dim=-1)
        return Teacher(run.backbone, texts.detach(), run, places)
    backbone = load_backbone(source, config.pretrained, device)
    return Teacher(backbone, backbone.class_embeddings(names, setup.config.prompt.templates))


def distilled(
    setup: Setup, task: TuningTask, teacher: Teacher, cache: EmbeddingCache, out: Path
) -> TuningTask:
    """Return the task of learning the teacher's answers, among all classes, without any label.

    The hashes of the photos and of the answers are written to `unlabelled.json`.

    Args:
        setup: of the run.
        task: of the labelled photos.
        teacher: whose most probable class stands for the label.
        cache: of the student's embeddings.
        out: the run folder.

    Raises:
        DataError: there are no readable photos.
        RunError: a resumed run was begun with other photos or another teacher.
    """
    photos = _photos(setup)
    answered, targets = teacher.answers(setup, photos)
    items, workers = answered.kept(photos.splits["train"]), setup.config.workers
    if not items:
        raise DataError(
            f"{photos.root}: expected photos to learn from, found none that is readable"
        )
    features = embed(setup.backbone, cache, photos, items, "photos without labels", workers=workers)
    if features.sha256 != answered.sha256:
        raise DataError(f"{photos.root}: photos changed while they were read; start again")
    say(f"learning the teacher's answers to {counted(len(features), 'photo')} without labels")
    known = frozenset() if teacher.run is None else teacher.run.unlabelled
    answers = hashlib.sha256(targets.numpy().tobytes()).hexdigest()
    runs.keep_unlabelled(out, known.union(features.sha256), answers)
    features = replace(features, labels=targets.argmax(dim=1))
    everything = tuple(range(len(setup.split.class_names)))
    bank = None
    if task.config.needs("bank"):
        bank = zero_shot_bank(task.scale, features, everything, setup.zero_shot)
    return replace(
        task,
        tuned=everything,
        train=features,
        val=task.val.rows(torch.zeros(0, dtype=torch.long)),
        reference=setup.zero_shot,
        bank=bank,
        targets=targets,
    )


def _photos(setup: Setup) -> Dataset:
    """Return the photos without labels: those of a folder, else the training photos."""
    folder = setup.config.distillation.unlabelled
    if folder is None:
        say("note: no --unlabelled photos: learning from the training photos, without their labels")
        return setup.dataset.with_split("train", setup.split.train)
    root = expand_home(folder)
    if not root.is_dir():
        raise DataError(f"--unlabelled {root}: expected a folder of photos")
    files = images_below(root)
    if not files:
        raise DataError(f"--unlabelled {root}: expected photos in the folder, found none")
    items = tuple(Item(file.relative_to(root).as_posix(), 0) for file in files)
    return Dataset(root, setup.split.class_names, {"train": items})

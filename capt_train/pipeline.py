"""What `capt-train` does: data, features, zero-shot, tuning, calibration, metrics."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from capt_deploy.core.console import say
from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import expand_home, write_json
from capt_deploy.data.datasets import Item
from capt_deploy.evaluation.evaluate import Report
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.confusion.mining import find_centres, find_sentences, mined_names, would_ask
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import Embedded, Features, embed
from capt_train.method.learner import Learner, make_learner
from capt_train.run import folder as runs
from capt_train.run.evaluate import score_model
from capt_train.run.fitting import Outcome, fit
from capt_train.run.folder import TunedModel
from capt_train.run.recolour import recolour
from capt_train.run.setup import Setup, absolute, load, locked, prepare
from capt_train.run.visual_side import tune_visual_side, with_tokens
from capt_train.tune.stages import TuningTask, text_stage
from capt_train.tune.tune import tune
from capt_train.tune.views import Views, embed_views

_TEXT_SIDE_VIEWS = 2  # the image itself, and one that only the bank sees
_MOST_VALIDATED = 5000  # images whose tokens are kept; more would hardly decide otherwise (ours)


def train(
    config: TrainConfig, out: str | Path, *, resume: bool = False, split_from: Path | None = None
) -> Report:
    """Tune a model on a few images and write a run folder.

    Args:
        config: all settings.
        out: the run folder; a new or empty one, or with `resume` that of an interrupted run.
        resume: continue; the result has the bits of an uninterrupted run.
        split_from: another run whose chosen images are used again; its choice replaces
            `classes` and `shots`, while `seed` still decides the rest.

    Returns:
        The content of `metrics.json`: accuracy and calibration, zero-shot beside tuned.

    Raises:
        CaptError: the data, the model, the settings or the folder cannot be used.
    """
    out = expand_home(out)
    with locked(out):
        setup = prepare(config, out, resume, split_from)
        with closing(EmbeddingCache(setup.model_sha256, setup.backbone.device.type)) as cache:
            outcome = _tune(setup, cache, out)
            model = fit(setup, outcome, out)
            images = {"train": len(outcome.task.train), "val": len(outcome.task.val)}
            report = {**_measure(setup, model, cache), "images": images}
        write_json(out / runs.METRICS, report)
    return report


def dry_run(config: TrainConfig, out: Path, split_from: Path | None = None) -> str:
    """Return the prompts that the run would send to the LLM; write nothing but cached embeddings.

    Raises:
        CaptError: as by `train`; also where no part needs sentences.
    """
    if not config.needs("sentences"):
        raise ConfigError(
            "--llm-dry-run: nothing asks an LLM; expected --with semantic-experts beside it"
        )
    config, out = absolute(config), expand_home(out)
    begun = out if (out / runs.CONFIG).exists() else None  # whose images are chosen already
    setup = load(config, split_from or begun)
    with closing(EmbeddingCache(setup.model_sha256, setup.backbone.device.type)) as cache:
        features = _embed(setup, cache, setup.split.train, "training images")
    pairs = _mined_pairs(setup, setup.zero_shot_bank(features))
    return would_ask(pairs, setup.tuned_names, config, out)


def _tune(setup: Setup, cache: EmbeddingCache, out: Path) -> Outcome:
    """Mine pairs, embed views, try how much visual tuning helps, and tune."""
    backbone, split, config = setup.backbone, setup.split, setup.config
    frozen = Embedded(
        _embed(setup, cache, split.train, "training images"),
        _embed(setup, cache, split.val, "validation images"),
    )
    recoloured, images = recolour(setup, frozen, out)
    centres = None
    if config.needs("sentences"):
        pairs = _mined_pairs(setup, setup.zero_shot_bank(frozen.train))
        sentences = find_sentences(pairs, setup.tuned_names, config, out)
        centres = find_centres(backbone, sentences, config)

    def make(tuned: tuple[int, ...]) -> Learner:
        classes = replace(split, tuned=tuned)
        return make_learner(recoloured, config, classes, setup.zero_shot, centres)

    learner = make(split.tuned)
    if learner.visual is not None:
        setup, frozen, images = _sampled(setup, frozen, images)
    bank = setup.zero_shot_bank(images.train)
    views = _views(setup, learner, split.train, images.train, "training images")
    task = TuningTask(
        backbone.scale,
        split.tuned,
        images.train,
        images.val,
        setup.zero_shot[list(split.tuned)],
        config,
        bank if config.needs("bank") else None,
        views,
    )
    if learner.visual is not None:
        val = None
        if len(images.val):
            val = _views(setup, learner, setup.split.val, images.val, "validation images", views=1)
        task = with_tokens(task, val, learner)
    states, trial = [], None
    if stage := text_stage(config, learner):
        state, written = tune(learner, task, out, stage)
        states.append(state)
        task = replace(task, bank=written)
    if learner.visual is not None:
        task = replace(task, class_rows=learner.class_rows(split.tuned))
        task, trial, further = tune_visual_side(learner, task, make, out)
        states += further
    bank = task.bank or bank
    return Outcome(learner, task, views, frozen, tuple(states), trial, bank, make)


def _mined_pairs(setup: Setup, bank: ConfusionBank) -> list[tuple[str, str]]:
    return mined_names(bank, setup.tuned_names, setup.config.confusion.pairs)


def _views(
    setup: Setup,
    learner: Learner,
    items: Sequence[Item],
    features: Features,
    label: str,
    views: int | None = None,
) -> Views:
    """Embed views of the images behind `features`, which may be fewer than `items`."""
    config = setup.config
    usual = config.visual.views if learner.visual is not None else _TEXT_SIDE_VIEWS
    return embed_views(
        setup.backbone,
        learner,
        setup.dataset,
        features.kept(items),
        views=views or usual,
        area=config.visual.view_area,
        seed=config.seed,
        label=label,
        workers=config.workers,
    )


def _embed(setup: Setup, cache: EmbeddingCache, items: Sequence[Item], label: str) -> Features:
    workers = setup.config.workers
    return embed(setup.backbone, cache, setup.dataset, items, label, workers=workers)


def _sampled(setup: Setup, frozen: Embedded, images: Embedded) -> tuple[Setup, Embedded, Embedded]:
    """Return the arguments with at most 5000 validation images, drawn by seed.

    Args:
        setup: of the run; the returned one lists the images that were drawn.
        frozen: embeddings of the run's images by the model as it came.
        images: embeddings of the same images through the colour map.
    """
    count = len(images.val)
    if count <= _MOST_VALIDATED:
        return setup, frozen, images
    say(
        f"note: {_MOST_VALIDATED} of the {count} validation images are used, drawn by seed: the "
        "visual side keeps tokens of each in memory"
    )
    draw = torch.Generator().manual_seed(setup.config.seed)
    chosen = torch.randperm(count, generator=draw)[:_MOST_VALIDATED].sort().values
    items = images.val.kept(setup.split.val)
    split = replace(setup.split, val=tuple(items[row] for row in chosen.tolist()))
    frozen = replace(frozen, val=frozen.val.rows(chosen))
    images = replace(images, val=images.val.rows(chosen))
    return replace(setup, split=split), frozen, images


def _measure(setup: Setup, model: TunedModel, cache: EmbeddingCache) -> Report:
    """Evaluate on test images; without any, on validation or training images, with a note."""
    dataset = setup.dataset
    dataset = dataset.with_split("val", dataset.splits["val"] or setup.split.val)
    measured_on = next(name for name in ("test", "val", "train") if dataset.splits[name])
    if measured_on != "test":
        say(f"note: no test images: measured on {measured_on} images, which the run has used")
    config = setup.config
    return {
        "split": measured_on,
        "method": config.method,
        "parts": sorted(model.learner.parts(config)),
        "shots": config.shots,
        "seed": config.seed,
        "temperature": model.fitted.temperature,
        "calibrator": model.fitted.calibration.calibrator,
        "strength": model.fitted.strength,
        "mixture": model.fitted.mixture.to_dict(),
        "trained_parameters": model.learner.size,
        **score_model(model, cache, dataset, measured_on).report(),
    }

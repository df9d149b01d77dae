"""What `capt-train` does: data, features, zero-shot, tuning, calibration, metrics."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from capt_deploy.core.console import say, table
from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import expand_home, write_json
from capt_deploy.data.datasets import Item
from capt_deploy.evaluation.evaluate import Report, Scores
from capt_deploy.evaluation.summary import choice_notes, choice_rows, curve_notes
from capt_train.calibrate.label_noise import fit_label_noise
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.confusion.mining import find_centres, find_sentences, mined_names, would_ask
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import Embedded, Features, embed
from capt_train.method.learner import Learner, make_learner
from capt_train.parallel import agreed, by_first
from capt_train.run import folder as runs
from capt_train.run.evaluate import RunScores, score_model
from capt_train.run.fitting import HeldOut, Outcome, fit
from capt_train.run.folder import TunedModel
from capt_train.run.recolour import recolour
from capt_train.run.setup import Setup, absolute, begun, load
from capt_train.run.suspects import write_suspects
from capt_train.run.teacher import distilled, load_teacher
from capt_train.run.visual_side import tune_visual_side, with_tokens
from capt_train.tune.candidates import candidates, folds_answer
from capt_train.tune.choice import Choice, choose
from capt_train.tune.stages import TuningTask
from capt_train.tune.text_side import tune_text_side
from capt_train.tune.views import Views, embed_views

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
    return tune_and_measure(config, out, resume=resume, split_from=split_from).report


@dataclass(frozen=True)
class Trained:
    """A run that has just ended."""

    report: Report  # the content of `metrics.json`
    model: TunedModel
    scores: RunScores  # of the images that it is measured on
    held_out: HeldOut


def tune_and_measure(
    config: TrainConfig, out: str | Path, *, resume: bool = False, split_from: Path | None = None
) -> Trained:
    """Do what `train` does, and return the model and its scores as well."""
    watch = _Stopwatch()
    with begun(config, expand_home(out), resume, split_from) as (start, folder):
        watch.lap("loading")
        with closing(EmbeddingCache(start.model_sha256, start.backbone.device.type)) as cache:
            setup, outcome = _tune(start, cache, folder, watch)
            model, held_out = fit(setup, outcome, folder)
            watch.lap("calibrating")
            images = {"train": len(outcome.task.train), "val": len(outcome.task.val)}
            model = replace(model, unlabelled=runs.read_unlabelled(folder))
            split, scores = _score(setup, model, outcome, held_out, cache)
            report = {**_report(model, outcome, split, scores), "images": images}
            watch.lap("measuring")
            write_json(folder / runs.METRICS, report)
            write_suspects(setup, model, outcome, held_out, cache, folder)
            watch.lap("looking for suspects")
    say(f"time: {watch}")
    return Trained(report, model, scores, held_out)


class _Stopwatch:
    """The seconds that each stage of a run takes, for its last line."""

    def __init__(self) -> None:
        self._laps: list[str] = []
        self._started = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self._laps.append(f"{stage} {now - self._started:.0f} s")
        self._started = now

    def __str__(self) -> str:
        return ", ".join(self._laps)


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


def _tune(
    setup: Setup, cache: EmbeddingCache, out: Path, watch: _Stopwatch
) -> tuple[Setup, Outcome]:
    """Mine pairs, choose on held-out photos, and tune; the setup has the chosen settings."""
    backbone, split, config = setup.backbone, setup.split, setup.config
    frozen = Embedded(
        _embed(setup, cache, split.train, "training images"),
        _embed(setup, cache, split.val, "validation images"),
    )
    watch.lap("embedding")
    recoloured, images = recolour(setup, frozen, out)
    if "colours" in config.parts:
        watch.lap("colours")
    centres = None
    if config.needs("sentences"):
        pairs = _mined_pairs(setup, setup.zero_shot_bank(frozen.train))
        find = partial(find_sentences, pairs, setup.tuned_names, config, out)
        sentences = by_first(find)
        centres = find_centres(backbone, sentences, split.class_names, setup.zero_shot, config)

    teacher = load_teacher(setup) if config.needs("teacher") else None
    texts = None if teacher is None else teacher.texts

    def make_from(config: TrainConfig, tuned: tuple[int, ...]) -> Learner:
        classes = replace(split, tuned=tuned)
        return make_learner(recoloured, config, classes, setup.zero_shot, centres, texts)

    bank = setup.zero_shot_bank(images.train) if config.needs("bank") else None
    task = TuningTask(
        backbone.scale,
        split.tuned,
        images.train,
        images.val,
        setup.zero_shot[list(split.tuned)],
        config,
        bank,
        label_noise=config.tuning.label_noise or 0.0,
    )
    choice = _choice(task, partial(make_from, config), setup.tuned_names, out)
    watch.lap("choosing")
    if choice is not None:
        setup = replace(setup, config=choice.chosen.applied(config))
        if bank is not None:
            bank = bank.updated(_filled(choice, bank), config.confusion.momentum)
        task = replace(task, config=setup.config, bank=bank)
        if config.tuning.label_noise is None:
            task = replace(task, label_noise=agreed(_label_noise(choice, task)))
    make = partial(make_from, setup.config)
    learner = make(split.tuned)
    if learner.visual is not None:
        setup, frozen, images = _sampled(setup, frozen, images)
        task = _with_tokens(setup, replace(task, val=images.val), learner)
    if teacher is None:
        state, written = tune_text_side(learner, task, out)
        task = replace(task, bank=written)
    else:
        state, _ = tune_text_side(learner, distilled(setup, task, teacher, cache, out), out)
    states, trial = [state] if state else [], None
    if learner.visual is not None and not setup.config.visual.joint:
        task = replace(task, class_rows=learner.class_rows(split.tuned))
        task, trial, further = tune_visual_side(learner, task, make, out)
        states += further
    watch.lap("tuning")
    return setup, Outcome(learner, task, frozen, tuple(states), choice, trial, task.bank, make)


def _choice(
    task: TuningTask,
    make: Callable[[tuple[int, ...]], Learner],
    class_names: Sequence[str],
    out: Path,
) -> Choice | None:
    """Return the choice on held-out photos; a resumed run reads the one it has written.

    None where the settings leave nothing to decide and validation images calibrate.
    """
    if not (out / runs.CHOICE).exists():
        config = task.config
        listed = candidates(config, judged=True)
        if len(listed) == 1 and (len(task.val) or not folds_answer(config)):
            return None
        new_classes = config.classes == "base"
        runs.write_choice(out, choose(task, make, class_names, new_classes=new_classes))
    choice = agreed(runs.read_choice(out))
    if choice is not None:
        values = choice.to_dict()
        more = values["learning_curve"]
        notes = choice_notes(values) + (curve_notes(more) if more else [])
        say("\n".join([table(*choice_rows(values)), *notes]))
    return choice


def _filled(choice: Choice, bank: ConfusionBank) -> Tensor:
    """Return out-of-fold logits, with the bank's confidences for photos that no fold judged."""
    logits = bank.confidences.clamp(min=torch.finfo(torch.float32).tiny).log()
    logits[choice.judging.to(logits.device)] = choice.out_of_fold.to(logits)
    return logits


def _label_noise(choice: Choice, task: TuningTask) -> float:
    """Return ε as held-out photos show it; the frozen model may know too little to tell."""
    if not len(choice.judging):
        return 0.0
    return fit_label_noise(choice.out_of_fold, task.labels[choice.judging]).share


def _with_tokens(setup: Setup, task: TuningTask, learner: Learner) -> TuningTask:
    """Return the task with views and tokens, for the visual side."""
    views = _views(setup, learner, setup.split.train, task.train, "training images")
    val = None
    if len(task.val):
        val = _views(setup, learner, setup.split.val, task.val, "validation images", views=1)
    return with_tokens(replace(task, views=views), val, learner)


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
    return embed_views(
        setup.backbone,
        learner,
        setup.dataset,
        features.kept(items),
        views=views or config.visual.views,
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


def _score(
    setup: Setup, model: TunedModel, outcome: Outcome, held_out: HeldOut, cache: EmbeddingCache
) -> tuple[str, RunScores]:
    """Return the scores of test images; without any, of held-out ones, with a note."""
    dataset, choice = setup.dataset, outcome.choice
    measured_on = next(name for name in ("test", "val", "train") if dataset.splits[name])
    judged = choice is not None and choice.images["tuned"]
    if measured_on == "train" and judged and len(held_out) and all(model.tuned):
        say(
            "note: no test images: measured on training photos, each by a model that had not seen "
            "it; the same photos chose what is kept and calibrate, so expect a little less"
        )
        return "cross-validation", _cross_validated(setup, model, outcome, held_out)
    if measured_on != "test":
        say(f"note: no test images: measured on {measured_on} images, which the run has used")
    return measured_on, score_model(model, cache, dataset, measured_on)


def _report(model: TunedModel, outcome: Outcome, split: str, scores: RunScores) -> Report:
    """Return the content of `metrics.json`, without the number of images."""
    config, choice = model.config, outcome.choice
    return {
        "split": split,
        "method": config.method,
        "parts": sorted(model.learner.parts(config)),
        "shots": config.shots,
        "seed": config.seed,
        "temperature": model.fitted.temperature,
        "calibrator": model.fitted.calibration.calibrator,
        "strength": model.fitted.strength,
        "mixture": model.fitted.mixture.to_dict(),
        "trained_parameters": model.learner.size,
        "choice": choice and choice.to_dict(),
        **scores.report(),
    }


def _cross_validated(
    setup: Setup, model: TunedModel, outcome: Outcome, held_out: HeldOut
) -> RunScores:
    """Return the scores of the training photos by models that had not seen them."""
    train, calibration = outcome.frozen.train, model.fitted.calibration
    scores = Scores(
        held_out.labels.numpy(),
        calibration.scale(held_out.tuned.numpy()),
        held_out.frozen.numpy() / model.fitted.zero_shot_temperature,
        calibration,
        model.fitted.zero_shot_temperature,
    )
    return RunScores(model, scores, setup.dataset.root, (), train.skipped)

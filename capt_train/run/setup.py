"""The first step of capt-train: lock the folder, load and check everything, then begin the run."""

import getpass
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from capt_deploy.core.console import say
from capt_deploy.core.errors import ConfigError, RunError
from capt_deploy.core.files import expand_home
from capt_deploy.data.datasets import Dataset, read_dataset
from capt_deploy.evaluation.evaluate import ClassPair, confusion_counts
from capt_train import parallel
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import choose_device, load_backbone
from capt_train.clip.text_tokens import whole_words
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.confusion.mining import SENTENCES, check_sources
from capt_train.data.features import Features
from capt_train.data.fewshot import FewShotSplit, choose
from capt_train.method.learner import left_out, make_learner
from capt_train.method.mixture import pseudo_class_names
from capt_train.run import folder as runs
from capt_train.tune.stages import zero_shot_bank

_AT_ONCE = 1024  # images; bounds the memory of images × classes
_SENTENCE_FILES = tuple(f"confusion.{name}" for name in ("sentences", "commonality", "difference"))
_ASKING = tuple(
    f"confusion.llm_{name}" for name in ("url", "model", "timeout_s", "retries", "backoff_s")
)
# Settings that may change before a run is resumed: images, names and model are checked by content,
# and sentences may come from elsewhere until the run has its own.
_MAY_MOVE = {"data", "class_names", "model", "pretrained", "device", "workers"}
_MAY_MOVE |= {f"distillation.{name}" for name in ("teacher", "pretrained", "unlabelled")}
_MAY_MOVE |= {*_SENTENCE_FILES, *_ASKING}


@dataclass(frozen=True)
class Setup:
    """Everything a run starts from, loaded and checked."""

    config: TrainConfig
    dataset: Dataset
    split: FewShotSplit
    backbone: Backbone
    model_sha256: str
    zero_shot: Float[Tensor, "classes dim"]  # hand-written t⁰

    def pseudo_class_names(self) -> list[str]:
        """Return random words that stand for new classes, as many as there are classes.

        Raises:
            ModelError: the tokenizer does not know enough words, or they cannot be listed.
        """
        names = self.split.class_names
        return pseudo_class_names(
            whole_words(self.backbone.tokens.tokenizer), len(names), self.config.seed, names
        )

    @property
    def tuned_names(self) -> list[str]:
        """Return the names of the tuned classes."""
        return [self.split.class_names[index] for index in self.split.tuned]

    def zero_shot_bank(self, train: Features) -> ConfusionBank:
        """Return the bank as the frozen model fills it, over the tuned classes."""
        tuned = list(self.split.tuned)
        return zero_shot_bank(self.backbone.scale, train, tuned, self.zero_shot[tuned])

    def zero_shot_confusions(self, train: Features) -> dict[ClassPair, int]:
        """Return how many images of a class the frozen model takes for another tuned class."""
        tuned = torch.tensor(self.split.tuned)
        texts = self.zero_shot[list(self.split.tuned)]
        best = [
            (part.to(texts) @ texts.T).argmax(dim=1) for part in train.embeddings.split(_AT_ONCE)
        ]
        predicted = tuned[torch.cat(best).cpu()]
        counts = confusion_counts(train.labels.numpy(), predicted.numpy())
        return {pair: count for pair, count in sorted(counts.items()) if pair[0] != pair[1]}


@contextmanager
def begun(
    config: TrainConfig, out: Path, resume: bool, split_from: Path | None
) -> Iterator[tuple[Setup, Path]]:
    """Lock and begin or continue the run in `out`; yield its setup and the folder to write to.

    Of several processes the first one does; each of the others continues a temporary copy.

    Raises:
        CaptError: the data, the model, the settings or the folder cannot be used.
    """
    if parallel.is_first():
        with locked(out):
            setup = prepare(config, out, resume, split_from)
            if parallel.count() > 1:
                files = [*out.glob("*.json"), *out.glob("*.safetensors")]
                parallel.agreed({file.name: file.read_bytes() for file in files})
            yield setup, out
        return
    with tempfile.TemporaryDirectory() as copy:
        for name, content in parallel.agreed(dict[str, bytes]()).items():
            (Path(copy) / name).write_bytes(content)
        yield prepare(config, Path(copy), True, None), Path(copy)


def prepare(config: TrainConfig, out: Path, resume: bool, split_from: Path | None) -> Setup:
    """Load and check everything, then begin or continue the run in `out`.

    Raises:
        CaptError: the data, the model, the settings or the folder cannot be used.
    """
    config = absolute(config)
    if split_from is not None:
        if resume:
            raise ConfigError("--split-from: a resumed run has its images already; leave it out")
        source, _ = runs.read_config(split_from)
        config = replace(config, classes=source.classes, shots=source.shots)
    _check_folder(out, config, resume)
    begun = (out / runs.CONFIG).exists()
    chosen = split_from or (out if begun else None)
    gathered = begun and (out / SENTENCES).exists()
    if gathered:
        config = _with_written_sources(config, out)
    setup = load(config, chosen, sources=not gathered)
    if begun:
        _check_model(out, setup.model_sha256)
    else:
        setup.split.save(out / runs.SPLIT)
    runs.begin(out, setup.config, setup.model_sha256)  # a resumed run may have moved
    return setup


def load(config: TrainConfig, split_from: Path | None = None, *, sources: bool = True) -> Setup:
    """Load and check data and model; write nothing.

    Args:
        config: all settings.
        split_from: run folder whose images are used again.
        sources: whether sentences must still be found, so that their files are checked.

    Raises:
        CaptError: the data, the model or the settings cannot be used.
    """
    device = parallel.own_device(choose_device(config.device))
    dataset = read_dataset(config.data, config.class_names, test_share=config.test_share)
    if split_from is not None:
        split = FewShotSplit.load(split_from / runs.SPLIT)
        split.check(dataset)
    else:
        split = choose(dataset, config.classes, config.shots, config.seed)
    backbone = load_backbone(config.model, config.pretrained, device)
    config = replace(config, model=backbone.name)  # for the run and what is exported from it
    for notice in (*split.notices, *left_out(backbone, config)):
        say(f"note: {notice}")
    zero_shot = backbone.class_embeddings(split.class_names, config.prompt.templates)
    # fail on names, sizes, sentence files or endpoint before time is spent
    make_learner(backbone, config, split, zero_shot)
    if sources and config.needs("sentences"):
        check_sources(config, split.class_names)
    setup = Setup(config, dataset, split, backbone, backbone.fingerprint(), zero_shot)
    if "mixture" in config.parts:
        setup.pseudo_class_names()
    return setup


def absolute(config: TrainConfig) -> TrainConfig:
    """Return the settings with absolute paths."""
    changes: dict[str, Any] = {"data": str(expand_home(config.data).resolve())}
    values = config.values()
    for name in ("class_names", "distillation.unlabelled", *_SENTENCE_FILES):
        if (value := values[name]) is not None:
            changes[name] = str(expand_home(value).resolve())
    folder = expand_home(config.model.removeprefix("local-dir:"))
    # any other folder may just share its name with an architecture
    if config.model.startswith("local-dir:") or (folder / "open_clip_config.json").is_file():
        changes["model"] = f"local-dir:{folder.resolve()}"
    if config.pretrained is not None and expand_home(config.pretrained).is_file():
        changes["pretrained"] = str(expand_home(config.pretrained).resolve())
    return config.with_settings(changes)


def _check_folder(out: Path, config: TrainConfig, resume: bool) -> None:
    if not (out / runs.CONFIG).exists():
        if resume:
            raise RunError(f"{out}: nothing to resume ({runs.CONFIG} is missing)")
        # split.json and hidden temporary files are what a kill during the first writes leaves
        if out.exists() and (not out.is_dir() or any(_is_foreign(file) for file in out.iterdir())):
            raise RunError(f"{out}: already exists and is not a run; choose another --out")
        return
    if not resume:
        raise RunError(f"{out}: holds a run; continue it with --resume, or choose another --out")
    written, _ = runs.read_config(out)
    was, now = written.values(), config.values()
    different = [
        f"{key} {was[key]!r} → {now[key]!r}"
        for key in was
        if was[key] != now[key] and key not in _MAY_MOVE
    ]
    if different:
        raise RunError(f"{out}: was begun with other settings: {'; '.join(different)}")


def _with_written_sources(config: TrainConfig, out: Path) -> TrainConfig:
    """Return the settings with the sources that the run's sentences came from."""
    written, _ = runs.read_config(out)
    values, before = config.values(), written.values()
    sources = {name: before[name] for name in (*_SENTENCE_FILES, *_ASKING)}
    other = [name for name, value in sources.items() if values[name] != value]
    if other:
        say(f"note: the run keeps its {SENTENCES}; not used: {', '.join(other)}")
    return config.with_settings(sources)


def _is_foreign(file: Path) -> bool:
    return file.name != runs.SPLIT and not (file.name[0] == "." and file.suffix == ".tmp")


def _check_model(out: Path, fingerprint: str) -> None:
    _, content = runs.read_config(out)
    if content["model_sha256"] != fingerprint:
        raise RunError(f"{out}: was begun with another model")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder; a killed process frees it.

    The lock is a temporary file outside the folder, so that a refused run leaves no folder.

    Raises:
        RunError: another process is tuning into it.
    """
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    user = getpass.getuser() if os.name != "posix" else str(os.getuid())
    lock = FileLock(Path(tempfile.gettempdir()) / f"capt-{user}-{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as cause:
        raise RunError(f"{folder}: another capt-train is writing this run") from cause
    try:
        yield
    finally:
        lock.release()

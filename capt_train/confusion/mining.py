"""From confused pairs to centres for semantic experts: sentences, their embeddings, K-means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from capt_deploy.core.console import say, table
from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank, mined_pairs
from capt_train.confusion.llm import LlmClient, key_from_environment
from capt_train.confusion.llm_answers import ask_all, dry_run, read_cache
from capt_train.confusion.sentences import (
    Gathered,
    NamePair,
    gather,
    pair_key,
    read_class_file,
    read_pair_file,
    write_pair_file,
)
from capt_train.method.semantic_experts import cluster
from capt_train.parts import SENTENCE_KINDS

SENTENCES, ANSWERS = "sentences.json", "llm_answers.json"


def mined_names(bank: ConfusionBank, names: Sequence[str], k: int) -> list[NamePair]:
    """Return the mined pairs by name, the most frequent first."""
    return [pair_key(names[a], names[b]) for a, b in mined_pairs(bank, k)]


def check_sources(config: TrainConfig, names: Sequence[str]) -> None:
    """Read the sentence files and check the endpoint's address, without asking it.

    Raises:
        DataError: a sentence file cannot be used.
        ConfigError: the endpoint cannot be used.
    """
    _files(config, names)
    _client(config)


def find_sentences(
    mined: Sequence[NamePair], names: Sequence[str], config: TrainConfig, folder: Path
) -> Gathered:
    """Collect the sentences of mined pairs from files, endpoint and templates (METHOD 3).

    They are written into the run folder as a file that `--sentences` takes, and so are the
    endpoint's answers one by one, so that an interrupted run asks for none of them again.

    Raises:
        DataError: a sentence file cannot be used.
        ConfigError, RunError: the endpoint cannot be used.
    """
    if (folder / SENTENCES).exists():  # a resumed run keeps its sentences
        return gather(mined, pair_sentences=read_pair_file(folder / SENTENCES, names))
    files = _files(config, names)
    gathered = gather(mined, **files)
    client = _client(config)
    if client is not None and gathered.on_templates:
        answers = ask_all(client, gathered.on_templates, folder / ANSWERS)
        gathered = gather(mined, **files, llm=answers)
    for notice in gathered.notices(names):
        say(f"note: {notice}")
    coverage = gathered.coverage(names)
    if any({*row.sources} - {"templates"} for row in coverage):
        rows = [[*map(str, row[:-1]), ", ".join(row.sources)] for row in coverage]
        say(table(["class in confused pairs", "pairs", *SENTENCE_KINDS, "from"], rows))
    write_pair_file(folder / SENTENCES, gathered.sentences)
    return gathered


def would_ask(
    mined: Sequence[NamePair], names: Sequence[str], config: TrainConfig, folder: Path
) -> str:
    """Return the prompts that `find_sentences` would send to the endpoint, without asking."""
    gathered = gather(mined, **_files(config, names))
    known = read_cache(folder / ANSWERS, gathered.on_templates)
    return dry_run(pair for pair in gathered.on_templates if pair not in known)


def find_centres(
    backbone: Backbone,
    gathered: Gathered,
    names: Sequence[str],
    zero_shot: Float[Tensor, "classes dim"],
    config: TrainConfig,
) -> Float[Tensor, "kinds classes centres dim"]:
    """Return the centres M_{e,c} of the sentences about each class's own pairs (METHOD 5).

    Of the sentences that tell two classes apart, each describes one of the two: the one whose
    hand-written embedding is nearer *(ours)*. A class that is in no mined pair has zeros.

    Args:
        backbone: embeds the sentences.
        gathered: sentences of the mined pairs.
        names: all classes.
        zero_shot: their hand-written embeddings.
        config: number of centres, and seed.
    """
    settings = config.experts
    found = zero_shot.new_zeros(len(SENTENCE_KINDS), len(names), settings.centres, len(zero_shot.T))
    place = {name: index for index, name in enumerate(names)}
    for kind, centres in zip(SENTENCE_KINDS, found, strict=True):
        texts = gathered.of_kind(kind)
        embedded = dict(zip(texts, backbone.sentence_embeddings(texts).to(zero_shot), strict=True))
        by_class: dict[int, list[Tensor]] = {}
        for pair, sentences in gathered.sentences.items():
            about = torch.stack([embedded[text] for text in getattr(sentences, kind)])
            classes = [place[name] for name in pair]
            nearer = (about @ zero_shot[classes].T).argmax(dim=1)
            for number, index in enumerate(classes):
                chosen = about[nearer == number] if kind == "difference" else about
                by_class.setdefault(index, []).extend(chosen if len(chosen) else about)
        for index, rows in by_class.items():
            centres[index] = cluster(torch.stack(rows), settings.centres, config.seed)
    return found


def _files(config: TrainConfig, names: Sequence[str]) -> dict[str, Any]:
    """Read the sentence files that are given, as keywords of `gather`."""
    files: dict[str, Any] = {}
    settings = config.confusion
    if settings.sentences is not None:
        files["pair_sentences"] = read_pair_file(Path(settings.sentences), names)
    for kind in SENTENCE_KINDS:
        if (file := getattr(settings, kind)) is not None:
            files[kind] = read_class_file(Path(file), names)
    return files


def _client(config: TrainConfig) -> LlmClient | None:
    """Return the client of the endpoint; None where none is given."""
    settings = config.confusion
    if settings.llm_url is None or settings.llm_model is None:
        return None
    return LlmClient(
        settings.llm_url,
        settings.llm_model,
        key=key_from_environment(),
        timeout_s=settings.llm_timeout_s,
        retries=settings.llm_retries,
        backoff_s=settings.llm_backoff_s,
    )

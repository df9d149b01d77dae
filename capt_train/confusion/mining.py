"""From confused pairs to the semantic experts' centres: sentences, their embeddings, K-means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from capt_deploy.core.console import say, table
from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank, pairs
from capt_train.confusion.llm import LlmClient, key_from_environment
from capt_train.confusion.llm_answers import DryRun, ask_all, dry_run, read_cache
from capt_train.confusion.sentence_files import read_class_file, read_pair_file, write_pair_file
from capt_train.confusion.sentences import Coverage, Gathered, Pair, gather, pair_key
from capt_train.method.semantic_experts import cluster
from capt_train.parts import SENTENCE_KINDS

SENTENCES, ANSWERS = "sentences.json", "llm_answers.json"


def mined_names(bank: ConfusionBank, names: Sequence[str], k: int) -> list[Pair]:
    """Return the mined pairs by name, the most frequent first."""
    return list(dict.fromkeys(pair_key(names[a], names[b]) for a, b, _ in pairs(bank, k)))


def check_sources(config: TrainConfig, names: Sequence[str]) -> None:
    """Read the sentence files and look at the endpoint's address, without asking it.

    Raises:
        DataError: a sentence file cannot be used.
        ConfigError: the endpoint cannot be used.
    """
    _files(config, names)
    _client(config)


def find_sentences(
    wanted: Sequence[Pair], names: Sequence[str], config: TrainConfig, folder: Path
) -> Gathered:
    """Collect the sentences of mined pairs from files, endpoint and templates (METHOD 3).

    They are written into the run folder as a file that `--sentences` takes, and so are the
    endpoint's answers one by one, so that an interrupted run asks for none of them again.

    Raises:
        DataError: a sentence file cannot be used.
        ConfigError, RunError: the endpoint cannot be used.
    """
    if (folder / SENTENCES).exists():  # a resumed run goes on with what it began with
        return gather(wanted, pair_sentences=read_pair_file(folder / SENTENCES, names))
    files = _files(config, names)
    found = gather(wanted, **files)
    client = _client(config)
    if client is not None and found.on_templates:
        answers = ask_all(client, found.on_templates, folder / ANSWERS)
        found = gather(wanted, **files, llm=answers)
    coverage = found.coverage(names)
    for notice in coverage.notices():
        say(f"note: {notice}")
    if len(coverage.without) < sum(row.pairs > 0 for row in coverage.rows):  # not only templates
        say(_by_class(coverage))
    write_pair_file(folder / SENTENCES, found.sentences)
    return found


def _by_class(coverage: Coverage) -> str:
    """Return how many sentences of each kind a class has, and from where."""
    rows = [
        [row.name, *map(str, (row.pairs, row.commonality, row.difference)), ", ".join(row.sources)]
        for row in coverage.rows
        if row.pairs
    ]
    return table(["class in confused pairs", "pairs", *SENTENCE_KINDS, "from"], rows)


def would_ask(
    wanted: Sequence[Pair], names: Sequence[str], config: TrainConfig, folder: Path
) -> DryRun:
    """Return what `find_sentences` would ask the endpoint about, without asking."""
    found = gather(wanted, **_files(config, names))
    known = read_cache(folder / ANSWERS, found.on_templates)
    return dry_run(pair for pair in found.on_templates if pair not in known)


def find_centres(
    backbone: Backbone, found: Gathered, config: TrainConfig
) -> Float[Tensor, "kinds centres dim"]:
    """Return the centres M_e of both kinds of sentences (METHOD 5)."""
    by_kind = [
        list(dict.fromkeys(text for own in found.sentences.values() for text in own.of(kind)))
        for kind in SENTENCE_KINDS
    ]
    embedded = [backbone.sentence_embeddings(texts) for texts in by_kind]
    return cluster(embedded, config.experts.centres, config.seed)


def _files(config: TrainConfig, names: Sequence[str]) -> dict[str, Any]:
    """Read the sentence files that are given, as keywords of `gather`."""
    found: dict[str, Any] = {}
    files = config.confusion
    if files.sentences is not None:
        found["pair_sentences"] = read_pair_file(Path(files.sentences), names)
    for kind in SENTENCE_KINDS:
        if (file := getattr(files, kind)) is not None:
            found[kind] = read_class_file(Path(file), names)
    return found


def _client(config: TrainConfig) -> LlmClient | None:
    """Return whom to ask; None where no endpoint is given."""
    llm = config.confusion
    if llm.llm_url is None or llm.llm_model is None:
        return None
    return LlmClient(
        llm.llm_url,
        llm.llm_model,
        key=key_from_environment(),
        timeout_s=llm.llm_timeout_s,
        retries=llm.llm_retries,
        backoff_s=llm.llm_backoff_s,
    )

"""The language model's answers on all mined pairs: asked, cached, or only estimated (METHOD 3)."""

from collections.abc import Iterable
from pathlib import Path

from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import DataError, RunError
from capt_train.confusion.llm import LlmClient, prompt
from capt_train.confusion.sentences import (
    NamePair,
    PairSentences,
    Sentences,
    list_names,
    pair_key,
    read_pair_file,
    write_pair_file,
)

_GIVE_UP_AFTER = 5  # failed pairs before the first answer: the address must be wrong
_ANSWER_TOKENS = 500  # 200 words of reasoning, ten sentences of 16 words, JSON


def ask_all(client: LlmClient, pairs: Iterable[NamePair], cache: Path) -> Sentences:
    """Ask about every pair that the cache does not hold yet, and write each answer to it at once.

    A message names the pairs without an answer; they are left out, and get templates instead.

    Args:
        client: the model to ask.
        pairs: in any order within a pair; repeated ones count once.
        cache: a file in the form for pairs; answers about other pairs stay in it.

    Raises:
        ConfigError: the server refuses to answer at all.
        RunError: the cache is damaged, or no pair got an answer.
    """
    distinct = dict.fromkeys(pair_key(*pair) for pair in pairs)
    answers = read_cache(cache, distinct)
    missing = [pair for pair in distinct if pair not in answers]
    failed: list[str] = []
    reason = ""
    with progress("asking the LLM", len(distinct), "pairs") as counter:
        counter.advance(len(distinct) - len(missing))
        for pair in missing:
            try:
                answers[pair] = client.ask(pair)
                write_pair_file(cache, answers)
            except RunError as error:
                failed.append(" and ".join(pair))
                reason = str(error)
                unanswered = answers.keys().isdisjoint(distinct)
                if unanswered and len(failed) == min(len(distinct), _GIVE_UP_AFTER):
                    raise
            counter.advance()
    if failed:
        say(f"no answer of the LLM, so templates are used: {list_names(failed)}; last: {reason}")
    return {pair: answers[pair] for pair in distinct if pair in answers}


def read_cache(cache: Path, pairs: Iterable[NamePair]) -> dict[NamePair, PairSentences]:
    """Return the whole answers of earlier runs; none where there is no file.

    Raises:
        RunError: the file is damaged; it is left as it is.
    """
    if not cache.exists():
        return {}
    try:
        answers = read_pair_file(cache, sorted({name for pair in pairs for name in pair}))
    except DataError as error:
        raise RunError(f"damaged answers of the LLM: {error}; mend or delete the file") from error
    return {
        pair: texts for pair, texts in answers.items() if texts.commonality and texts.difference
    }


def dry_run(pairs: Iterable[NamePair]) -> str:
    """Return the prompts that `ask_all` would send about these pairs, and their number of tokens.

    A token is counted for every four bytes of a prompt, as is usual for English.
    """
    prompts = [prompt(pair) for pair in dict.fromkeys(pair_key(*pair) for pair in pairs)]
    sent = sum(-(-len(text.encode()) // 4) for text in prompts)
    summary = (
        f"{len(prompts)} prompts: about {sent} tokens to send (a token for 4 bytes) and "
        f"{_ANSWER_TOKENS * len(prompts)} to receive ({_ANSWER_TOKENS} an answer; models that "
        f"think aloud take more); retries not counted"
    )
    shown = [f"--- prompt {number} ---\n{text}" for number, text in enumerate(prompts, 1)]
    return "\n\n".join([*shown, summary])

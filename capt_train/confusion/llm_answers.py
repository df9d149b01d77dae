"""Answers of a language model on all mined pairs: asked, cached, or only counted (METHOD 3)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import DataError, RunError
from capt_train.confusion.llm import LlmClient, prompt
from capt_train.confusion.sentence_files import read_pair_file, write_pair_file
from capt_train.confusion.sentences import Pair, PairSentences, Sentences, list_names, pair_key
from capt_train.parts import SENTENCE_KINDS

_HOPELESS = 5  # pairs in a row without a single answer before: the address must be wrong
_ANSWER_TOKENS = 500


def ask_all(client: LlmClient, pairs: Iterable[Pair], cache: Path) -> Sentences:
    """Ask about every pair that the cache does not hold yet, and write each answer to it at once.

    A pair without an answer is said by name and left out, so that the templates step in.

    Args:
        client: whom to ask.
        pairs: in any order within a pair; repeated ones count once.
        cache: a file in the form for pairs; answers about other pairs stay in it.

    Raises:
        ConfigError: the server refuses to answer at all.
        RunError: the cache is damaged, or no pair got an answer.
    """
    wanted = dict.fromkeys(pair_key(*pair) for pair in pairs)
    answers = read_cache(cache, wanted)
    missing = [pair for pair in wanted if pair not in answers]
    failed: list[str] = []
    reason = ""
    with progress("asking the LLM", len(wanted), "pairs") as counter:
        counter.advance(len(wanted) - len(missing))
        for pair in missing:
            try:
                answers[pair] = client.ask(pair)
                write_pair_file(cache, answers)
            except RunError as error:
                failed.append(" and ".join(pair))
                reason = str(error)
                none_so_far = answers.keys().isdisjoint(wanted)
                if none_so_far and len(failed) == min(len(wanted), _HOPELESS):
                    raise
            counter.advance()
    if failed:
        say(f"templates stand in, the LLM left out {list_names(failed)}; the last one: {reason}")
    return {pair: answers[pair] for pair in wanted if pair in answers}


def read_cache(cache: Path, pairs: Iterable[Pair]) -> dict[Pair, PairSentences]:
    """Return the answers of earlier runs, whole ones only; none where there is no file.

    Raises:
        RunError: the file is damaged; it is left as it is.
    """
    if not cache.exists():
        return {}
    names = sorted({name for pair in pairs for name in pair})
    try:
        found = read_pair_file(cache, names)
    except DataError as error:
        raise RunError(f"damaged answers of the LLM: {error}; mend or delete the file") from error
    return {pair: texts for pair, texts in found.items() if all(map(texts.of, SENTENCE_KINDS))}


@dataclass(frozen=True)
class DryRun:
    """What would be asked, and roughly how many tokens that takes."""

    prompts: tuple[str, ...]

    @property
    def prompt_tokens(self) -> int:
        """A token for every four bytes, as is usual for English, rounded up for each prompt."""
        return sum(-(-len(prompt.encode()) // 4) for prompt in self.prompts)

    @property
    def answer_tokens(self) -> int:
        """A flat number an answer: 200 words of reasoning, ten sentences of 16 words, JSON."""
        return _ANSWER_TOKENS * len(self.prompts)

    def text(self) -> str:
        """Return the prompts, their count and the estimate, for people."""
        return "\n\n".join(
            [
                *(f"--- prompt {n} ---\n{prompt}" for n, prompt in enumerate(self.prompts, 1)),
                f"{len(self.prompts)} prompts: about {self.prompt_tokens} tokens to send (a token "
                f"for 4 bytes) and {self.answer_tokens} to receive ({_ANSWER_TOKENS} an answer; "
                f"models that think aloud take more); retries not counted",
            ]
        )


def dry_run(pairs: Iterable[Pair]) -> DryRun:
    """Return what `ask_all` would ask about these pairs, without asking."""
    return DryRun(tuple(map(prompt, dict.fromkeys(pair_key(*pair) for pair in pairs))))

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capt_deploy.core.errors import ConfigError, RunError
from capt_train.confusion.llm import LlmClient, prompt
from capt_train.confusion.llm_answers import ask_all, dry_run
from capt_train.confusion.sentences import PairSentences

KEY = "sk-very/secret+key=="
PAIR = ("beaver", "otter")
GOOD = PairSentences(("Both swim.", "Both have fur."), ("The beaver has a flat tail.",))
JSON = json.dumps({"commonality": GOOD.commonality, "difference": GOOD.difference})


def http(code: int, body: str = "") -> tuple[int, str, dict[str, str]]:
    return code, body, {}


def message(text: str) -> tuple[int, str, dict[str, str]]:
    return http(200, json.dumps({"choices": [{"message": {"content": text}}]}))


@pytest.fixture
def server(llm_server: Any) -> Any:
    llm_server.usual = message(JSON)
    return llm_server


@pytest.fixture
def client(server: Any) -> LlmClient:
    return LlmClient(
        server.url,
        "tiny",
        key=KEY,
        timeout_s=5.0,
        retries=2,
        backoff_s=1.0,
        sleep=lambda _: None,
    )


PAIRS = [("beaver", "otter"), ("cat", "lynx"), ("elm", "oak")]


def asked(server: Any) -> list[str]:
    return [body["messages"][0]["content"] for _, _, body in server.requests]


def test_each_pair_is_asked_once_and_kept(client: LlmClient, server: Any, tmp_path: Path) -> None:
    cache = tmp_path / "run" / "answers.json"
    found = ask_all(client, [*PAIRS, ("otter", "beaver")], cache)
    assert list(found) == PAIRS
    assert asked(server) == [prompt(pair) for pair in PAIRS]
    again = ask_all(client, reversed(PAIRS), cache)
    assert again == found
    assert list(again) == PAIRS[::-1]
    assert len(server.requests) == 3
    assert KEY not in cache.read_text()


def test_answers_about_other_pairs_stay_in_the_cache(client: LlmClient, tmp_path: Path) -> None:
    cache = tmp_path / "answers.json"
    ask_all(client, PAIRS[:2], cache)
    assert list(ask_all(client, PAIRS[2:], cache)) == PAIRS[2:]
    assert list(json.loads(cache.read_text())) == ["beaver|otter", "cat|lynx", "elm|oak"]


def test_an_interrupted_run_goes_on_with_what_is_missing(
    client: LlmClient, server: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "answers.json"
    server.replies = [message(JSON), message(JSON), http(500)]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_all(replace(client, sleep=interrupt), PAIRS, cache)
    assert list(json.loads(cache.read_text())) == ["beaver|otter", "cat|lynx"]
    server.requests.clear()
    assert list(ask_all(client, PAIRS, cache)) == PAIRS
    assert asked(server) == [prompt(PAIRS[2])]


def test_an_answer_that_is_not_whole_is_asked_for_again(
    client: LlmClient, server: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "answers.json"
    cache.write_text('{"beaver|otter": {"commonality": ["a"], "difference": []}}')
    assert ask_all(client, [PAIR], cache) == {PAIR: GOOD}


@pytest.mark.parametrize("damage", ["", '{"beaver|otter": ', "[]", '{"beaver": ["a"]}'])
def test_a_damaged_cache_is_refused_and_left_alone(
    damage: str, client: LlmClient, server: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "answers.json"
    cache.write_text(damage)
    with pytest.raises(RunError, match=r"answers\.json.*mend or delete the file"):
        ask_all(client, PAIRS, cache)
    assert cache.read_text() == damage
    assert server.requests == []


def test_a_pair_without_an_answer_is_named_and_left_out(
    client: LlmClient, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [message("no")] * 3
    found = ask_all(client, PAIRS, tmp_path / "answers.json")
    assert list(found) == PAIRS[1:]
    assert list(json.loads((tmp_path / "answers.json").read_text())) == ["cat|lynx", "elm|oak"]
    said = capsys.readouterr().err
    assert "so templates are used: beaver and otter" in said
    assert "does not end with the JSON asked for, but 'no'" in said
    server.requests.clear()
    assert list(ask_all(client, PAIRS, tmp_path / "answers.json")) == PAIRS
    assert asked(server) == [prompt(PAIR)]


def test_pairs_without_an_answer_do_not_undo_the_cached_ones(
    client: LlmClient, server: Any, tmp_path: Path
) -> None:
    ask_all(client, PAIRS[:1], tmp_path / "answers.json")
    server.replies = [http(500)] * 60
    others = [("a", f"b{n}") for n in range(6)]
    found = ask_all(client, [*others, *PAIRS[:1]], tmp_path / "answers.json")
    assert list(found) == PAIRS[:1]


@pytest.mark.parametrize(("count", "tries"), [(1, 3), (3, 9), (20, 15)])
def test_where_no_pair_gets_an_answer_it_gives_up(
    count: int, tries: int, client: LlmClient, server: Any, tmp_path: Path
) -> None:
    server.replies = [http(500)] * 60
    with pytest.raises(RunError, match="HTTP 500"):
        ask_all(client, [("a", f"b{n}") for n in range(count)], tmp_path / "answers.json")
    assert len(server.requests) == tries
    assert not (tmp_path / "answers.json").exists()


def test_a_refusal_ends_it_and_keeps_the_answers(
    client: LlmClient, server: Any, tmp_path: Path
) -> None:
    server.replies = [message(JSON), http(401)]
    with pytest.raises(ConfigError, match="HTTP 401"):
        ask_all(client, PAIRS, tmp_path / "answers.json")
    assert list(json.loads((tmp_path / "answers.json").read_text())) == ["beaver|otter"]
    assert len(server.requests) == 2


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_prompt_that_is_refused_costs_its_pair_alone(
    code: int, client: LlmClient, server: Any, tmp_path: Path
) -> None:
    server.replies = [http(code, "content_filter")]
    assert list(ask_all(client, PAIRS, tmp_path / "answers.json")) == PAIRS[1:]
    assert len(server.requests) == len(PAIRS)


def test_nothing_to_ask_is_fine(client: LlmClient, tmp_path: Path) -> None:
    assert ask_all(client, [], tmp_path / "answers.json") == {}


def test_a_dry_run_shows_the_very_prompts_and_their_size(client: LlmClient, server: Any) -> None:
    shown = dry_run([*PAIRS, ("otter", "beaver")])
    prompts = [prompt(pair) for pair in PAIRS]
    for number, text in enumerate(prompts, 1):
        assert f"--- prompt {number} ---\n{text}\n" in shown
    tokens = sum(-(-len(text.encode()) // 4) for text in prompts)
    assert f"3 prompts: about {tokens} tokens to send" in shown
    assert "1500 to receive" in shown
    client.ask(PAIR)
    assert asked(server) == [prompts[0]]
    assert dry_run([]).startswith("0 prompts: about 0 tokens")

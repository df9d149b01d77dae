"""From mined pairs to centres, and the whole run with an LLM behind a real local endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from capt_train.cli.train import main
from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.confusion.mining import (
    ANSWERS,
    SENTENCES,
    find_centres,
    find_sentences,
    mined_names,
)
from capt_train.pipeline import dry_run, train
from tests.configs import changed, train_config

Configure = Callable[..., TrainConfig]
SEMANTIC = ("semantic-experts",)
NAMES = ("zebra", "cat", "lynx")


def reply_to(handler: Any, **changes: str) -> None:
    """Answer with sentences that name the pair that was asked about."""
    prompt = handler.server_requests[-1][2]["messages"][0]["content"]
    _, a, _, b, *_ = prompt.split('"')
    own = {
        "commonality": [f"{a} and {b} share."],
        "difference": [f"{a} differs from {b}."],
    }
    choice = {"message": {"content": json.dumps(own)}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice]}).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def llm(llm_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the local server, answering well."""
    monkeypatch.delenv("CAPT_LLM_KEY", raising=False)

    def answer(handler: Any) -> None:
        handler.server_requests = llm_server.requests
        reply_to(handler)

    llm_server.usual = answer
    return llm_server


def asked(server: Any) -> list[tuple[str, str]]:
    """Return the pairs that were asked about."""
    prompts = [body["messages"][0]["content"].split('"') for _, _, body in server.requests]
    return [(parts[1], parts[3]) for parts in prompts]


def bank() -> ConfusionBank:
    logits = torch.tensor([[0.0, 3, 1], [0, 3, 1], [0, 0, 3], [1, 3, 0]])
    return ConfusionBank.fill(logits, torch.tensor([1, 1, 2, 0]), torch.eye(4, 8))


def test_mined_pairs_come_by_name_the_most_frequent_first() -> None:
    found = mined_names(bank(), NAMES, 1)
    assert found[0] == ("cat", "lynx")  # in alphabetical order within a pair
    assert ("cat", "zebra") in found
    assert len({*found}) == len(found)


def test_each_class_has_the_centres_of_its_own_sentences(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    config = train_config(data="", model="", experts_centres=3)
    names = ("zebra", "cow", "cat", "lynx")
    zero_shot = tiny_backbone.class_embeddings(names, ["a photo of a {}."])
    found = find_sentences([("cat", "lynx"), ("cat", "zebra")], NAMES, config, tmp_path)
    centres = find_centres(tiny_backbone, found, names, zero_shot, config)
    assert centres.shape == (2, 4, 3, 32)
    assert not centres[:, 1].any()  # no mined pair has a cow
    torch.testing.assert_close(centres[:, [0, 2, 3]].norm(dim=-1), torch.ones(2, 3, 3))
    shared = tiny_backbone.sentence_embeddings(found.sentences["cat", "zebra"].commonality)
    torch.testing.assert_close(centres[0, 0].sort(0).values, shared.sort(0).values)
    about = tiny_backbone.sentence_embeddings(found.sentences["cat", "zebra"].difference)
    nearer = (about @ zero_shot[[2, 0]].T).argmax(dim=1)
    zebras = about[nearer == 1] if (nearer == 1).any() else about
    distances = torch.cdist(centres[1, 0], zebras)
    assert distances.amin(dim=0).max() < 1e-3  # each of its sentences, and no other
    assert distances.amin(dim=1).max() < 1e-3
    own = json.loads((tmp_path / SENTENCES).read_text())
    assert list(own) == ["cat|lynx", "cat|zebra"]
    again = changed(config, added=SEMANTIC, confusion_sentences=str(tmp_path / SENTENCES))
    (tmp_path / "again").mkdir()
    second = find_sentences(list(found.sentences), NAMES, again, tmp_path / "again")
    assert torch.equal(find_centres(tiny_backbone, second, names, zero_shot, again), centres)


def test_what_a_file_says_is_not_asked(
    llm: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.json"
    texts = {
        "commonality": ["Both have fur."],
        "difference": ["A lynx has a short tail."],
    }
    file.write_text(json.dumps({"lynx|cat": texts}))
    config = train_config(
        "", "", added=SEMANTIC, confusion_sentences=str(file), confusion_llm_retries=0
    )
    config = changed(config, confusion_llm_url=llm.url, confusion_llm_model="tiny")
    wanted = [("cat", "lynx"), ("cat", "zebra")]
    found = find_sentences(wanted, NAMES, config, tmp_path)
    assert asked(llm) == [("cat", "zebra")]
    printed = capfd.readouterr().err
    assert re.search(r"^lynx +1 +1 +1 +pair file$", printed, re.MULTILINE)
    assert re.search(r"^zebra +1 +1 +1 +llm$", printed, re.MULTILINE)
    # a run that goes on keeps the sentences it began with, whatever the files say by then
    file.write_text(json.dumps({"lynx|cat": {**texts, "commonality": ["Another one."]}}))
    assert find_sentences(wanted, NAMES, config, tmp_path).sentences == found.sentences
    assert len(asked(llm)) == 1
    assert found.sentences["cat", "lynx"].commonality == ("Both have fur.",)
    assert found.sentences["cat", "zebra"].difference == ("cat differs from zebra.",)


@pytest.fixture
def with_llm(configure: Configure, llm: Any) -> TrainConfig:
    """Return the configuration of a run whose semantic experts get sentences from the LLM."""
    own = {
        "method": "prompt",
        "added": ("semantic-experts",),
        "tuning_epochs": 1,
        "confusion_llm_backoff_s": 0.0,
    }
    return configure(
        **own, confusion_llm_url=llm.url, confusion_llm_model="tiny", confusion_llm_retries=0
    )


def test_a_run_asks_about_every_mined_pair_once_and_uses_the_answers(
    with_llm: TrainConfig, llm: Any, tmp_path: Path
) -> None:
    train(with_llm, tmp_path / "run")
    answers = json.loads((tmp_path / "run" / ANSWERS).read_text())
    pairs = asked(llm)
    assert len({*pairs}) == len(pairs) > 2
    assert [tuple(key.split("|")) for key in answers] == pairs
    sentences = json.loads((tmp_path / "run" / SENTENCES).read_text())
    assert sentences == answers
    for a, b in pairs:
        assert sentences[f"{a}|{b}"]["commonality"] == [f"{a} and {b} share."]
    train(with_llm, tmp_path / "run", resume=True)
    assert asked(llm) == pairs


def test_an_interrupted_run_asks_nothing_twice_and_ends_the_same(
    with_llm: TrainConfig, llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capt_train.confusion.llm import LlmClient

    ask, calls = LlmClient.ask, []

    def interrupted(client: LlmClient, pair: tuple[str, str]) -> Any:
        calls.append(pair)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(client, pair)

    with monkeypatch.context() as patch:
        patch.setattr(LlmClient, "ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(with_llm, tmp_path / "cut")
    before = asked(llm)
    assert before == calls[:2]
    train(with_llm, tmp_path / "cut", resume=True)
    pairs = asked(llm)
    assert len({*pairs}) == len(pairs) > 3
    train(with_llm, tmp_path / "whole")
    assert asked(llm)[len(pairs) :] == pairs
    for name in (SENTENCES, ANSWERS, "best.safetensors", "last.safetensors", "result.json"):
        cut, whole = (tmp_path / run / name for run in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes(), name


def test_a_pair_without_an_answer_gets_templates(
    with_llm: TrainConfig, llm: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llm.replies = [(500, "sorry", {})]
    train(with_llm, tmp_path / "run")
    first = asked(llm)[0]
    name = "|".join(first)
    assert " and ".join(first) in capfd.readouterr().err
    assert name not in json.loads((tmp_path / "run" / ANSWERS).read_text())
    sentences = json.loads((tmp_path / "run" / SENTENCES).read_text())
    assert sentences[name]["commonality"][0].startswith("A photo of what could be")


def test_a_dry_run_prints_what_would_be_asked_and_leaves_nothing(
    with_llm: TrainConfig, llm: Any, tmp_path: Path
) -> None:
    arguments = ["--data", with_llm.data, "--model", with_llm.model, "--shots", "3"]
    arguments += ["--device", "cpu", "--method", "prompt", "--with", "semantic-experts"]
    arguments += ["--epochs", "1", "--llm-url", llm.url, "--llm-model", "tiny"]
    arguments += ["--set", "confusion.llm_retries=0", "--set", "confusion.llm_backoff_s=0"]
    out = ["--out", str(tmp_path / "run")]
    dry = CliRunner().invoke(main, [*arguments, *out, "--llm-dry-run"], catch_exceptions=False)
    assert dry.exit_code == 0
    assert llm.requests == []
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(main, [*arguments, *out], catch_exceptions=False)
    assert done.exit_code == 0
    prompts = [body["messages"][0]["content"] for _, _, body in llm.requests]
    assert prompts
    for number, prompt in enumerate(prompts, 1):
        assert f"--- prompt {number} ---\n{prompt}\n" in dry.stdout
    tokens = sum(-(-len(prompt.encode()) // 4) for prompt in prompts)
    assert f"{len(prompts)} prompts: about {tokens} tokens to send" in dry.stdout
    assert f"{500 * len(prompts)} to receive" in dry.stdout
    again = CliRunner().invoke(main, [*arguments, *out, "--llm-dry-run"], catch_exceptions=False)
    assert "0 prompts: about 0 tokens" in again.stdout


def test_a_dry_run_is_about_the_images_that_a_run_has_chosen(
    with_llm: TrainConfig, llm: Any, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    plain = changed(with_llm, added=(), confusion_llm_url=None, confusion_llm_model=None)
    train(replace(plain, classes="base"), first)
    before = dry_run(with_llm, second, first)
    train(with_llm, second, split_from=first)
    (second / ANSWERS).unlink()
    assert dry_run(with_llm, second) == before
    assert len(dry_run(with_llm, tmp_path / "third")) > len(before)

from __future__ import annotations

import gzip
import json
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import quote

import pytest

from capt_deploy.core.errors import CaptError, ConfigError, RunError
from capt_train.confusion.llm import LlmClient, key_from_environment, prompt
from capt_train.confusion.sentences import PairSentences

KEY = "sk-very/secret+key=="
PAIR = ("beaver", "otter")
GOOD = PairSentences(("Both swim.", "Both have fur."), ("The beaver has a flat tail.",))
JSON = json.dumps({"commonality": GOOD.commonality, "difference": GOOD.difference})
Reply = tuple[int, str, dict[str, str]] | Callable[[BaseHTTPRequestHandler], None]


def http(code: int, body: str = "", **headers: str) -> Reply:
    return code, body, headers


def message(text: Any, finish_reason: str = "stop") -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return http(200, json.dumps({"choices": [choice]}))


@pytest.fixture
def server(llm_server: Any) -> Any:
    llm_server.usual = message(JSON)
    return llm_server


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def client(server: Any, waits: list[float]) -> LlmClient:
    return LlmClient(
        server.url,
        "tiny",
        key=KEY,
        timeout_s=5.0,
        retries=2,
        backoff_s=1.0,
        sleep=waits.append,
    )


def with_timeout(client: LlmClient, timeout_s: float, **changes: Any) -> LlmClient:
    values = {
        **{name: getattr(client, name) for name in ("key", "retries", "backoff_s", "sleep")},
        **changes,
    }
    return LlmClient(client.url, client.model, timeout_s=timeout_s, **values)


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions"])
def test_the_request_is_a_chat_completion(ending: str, server: Any) -> None:
    url = server.url + ending
    client = LlmClient(url, "tiny", key=KEY, timeout_s=5.0, retries=0, backoff_s=0.0)
    assert client.ask(PAIR) == GOOD
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    # and nothing else: models that reason refuse other temperatures than theirs
    assert body == {"model": "tiny", "messages": [{"role": "user", "content": prompt(PAIR)}]}
    for part in ("step by step", '"beaver"', '"otter"', '{"commonality": ["…"], "difference":'):
        assert part in prompt(PAIR)


def test_a_local_server_needs_no_key_and_gets_none_of_the_environment(
    client: LlmClient, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"secret {name}")
    assert with_timeout(client, 5.0, key=None).ask(PAIR) == GOOD
    headers = server.requests[0][1]
    assert "Authorization" not in headers
    assert not any("secret" in value for value in headers.values())


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPT_LLM_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "of another server")
    assert key_from_environment() is None
    monkeypatch.setenv("CAPT_LLM_KEY", " ")
    assert key_from_environment() is None
    monkeypatch.setenv("CAPT_LLM_KEY", "secret\n")
    assert key_from_environment() == "secret"


DRAFT = '{"commonality": ["draft"], "difference": ["draft"]}'


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"Both live in {{rivers}}, so…\n```json\n{JSON}\n```",
        f"<think>{DRAFT}</think> a first try {DRAFT}, better: {JSON} Done.",
        f'{{"commonality": ["unfinished\n{JSON}',
    ],
)
def test_the_last_json_object_of_a_message_is_the_answer(
    text: str, client: LlmClient, server: Any, waits: list[float]
) -> None:
    server.replies = [message(text)]
    assert client.ask(PAIR) == GOOD
    assert waits == []


def test_sentences_are_cleaned(client: LlmClient, server: Any) -> None:
    answer = {"commonality": [" a\nb ", "a b"], "difference": ["c \ud800"]}
    server.replies = [message(json.dumps(answer))]
    assert client.ask(PAIR) == PairSentences(("a b",), ("c ?",))


def answer(**changes: Any) -> Reply:
    return message(json.dumps({"commonality": ["a"], "difference": ["b"], **changes}))


UNUSABLE = {
    "no json": message("I cannot help with that."),
    "none": message(None),
    "parts": message([{"type": "text", "text": JSON}]),
    "broken": message(JSON[:-2]),
    "missing key": message('{"commonality": ["a"]}'),
    "further key": answer(confidence=["high"]),
    "last one wrong": message(f"{JSON} {{}}"),
    "nested": message(f'{{"answer": {JSON}}}'),
    "empty list": answer(difference=[]),
    "text for list": answer(difference="b"),
    "blank sentence": answer(commonality=["a", " "]),
    "number": answer(commonality=[1]),
    "endless sentence": answer(commonality=["a" * 401]),
    "too many": answer(commonality=["a"] * 21),
    "endless reasoning": message("a" * 100_001 + JSON),
    "cut off": message(JSON, finish_reason="length"),
    "holds the key": answer(commonality=[f"my key is {KEY}"]),
    "deep": message('{"a":' * 20_000),
    "not json": http(200, "<html>gateway</html>"),
    "deep body": http(200, "[" * 100_000),
    "another object": http(200, '{"error": "no"}'),
    "no choices": http(200, '{"choices": []}'),
    "list": http(200, "[]"),
    "nothing": http(204),
    "truncated body": http(200, '{"choices": [', Content_Length="5000"),
    "broken chunks": http(200, "zz\r\n", Transfer_Encoding="chunked"),
    "500": http(500, "oops"),
    "503": http(503),
    "408": http(408),
    "429": http(429),
    "hangs up": lambda handler: handler.connection.close(),
}


def test_words_that_a_key_has_too_are_no_key(server: Any, client: LlmClient) -> None:
    words = "Good light is required to tell them apart."
    server.replies = [answer(commonality=[words])]
    found = replace(client, key="sk-no-key-required").ask(PAIR)
    assert [*found.commonality] == [words]
    assert len(server.requests) == 1


@pytest.mark.parametrize("reply", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_what_another_try_may_mend_is_tried_again(
    reply: Reply, client: LlmClient, server: Any, waits: list[float]
) -> None:
    server.replies = [reply, reply]
    assert client.ask(PAIR) == GOOD
    assert len(server.requests) == 3
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize("reply", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_after_all_tries_it_says_what_came(
    reply: Reply, client: LlmClient, server: Any, waits: list[float]
) -> None:
    server.replies = [reply] * 3
    with pytest.raises(RunError, match=r"sentences on beaver and otter, but in 3 tries came: .+;"):
        client.ask(PAIR)
    assert len(server.requests) == 3
    assert waits == [1.0, 2.0]


def test_answers_of_any_size_are_read_only_so_far(
    client: LlmClient, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capt_train.confusion.llm._MAX_RESPONSE_BYTES", 3000)
    padding = " " * 3000
    server.replies = [http(200, json.dumps({"choices": []}) + padding)] * 3
    with pytest.raises(RunError, match="more than 3000 bytes"):
        client.ask(PAIR)


def test_an_answer_that_would_unpack_to_any_size_is_not_unpacked(
    client: LlmClient, server: Any
) -> None:
    def bomb(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(gzip.compress(JSON.encode()))

    server.replies = [bomb]
    with pytest.raises(RunError, match="an answer packed as 'gzip', unasked for"):
        with_timeout(client, 5.0, retries=0).ask(PAIR)


@pytest.mark.parametrize("reason", ["no such model", "the key is not valid: sk-very***=="])
def test_an_error_without_the_key_is_shown(reason: str, client: LlmClient, server: Any) -> None:
    server.replies = [http(401, reason)]
    with pytest.raises(ConfigError) as caught:
        client.ask(PAIR)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "waited"),
    [("7", 7.0), ("0.5", 1.0), ("86400", 60.0), ("soon", 1.0), ("-5", 1.0), ("nan", 1.0)],
)
def test_retry_after_is_honoured_up_to_a_minute(
    asked: str, waited: float, client: LlmClient, server: Any, waits: list[float]
) -> None:
    server.replies = [http(429, Retry_After=asked), http(503)]
    assert client.ask(PAIR) == GOOD
    assert waits == [waited, 2.0]


def test_the_back_off_doubles_up_to_a_minute(server: Any, waits: list[float]) -> None:
    server.replies = [http(500)] * 5
    client = LlmClient(
        server.url, "m", key=None, timeout_s=5.0, retries=5, backoff_s=7.0, sleep=waits.append
    )
    client.ask(PAIR)
    assert waits == [7.0, 14.0, 28.0, 56.0, 60.0]


def test_a_server_that_never_answers_is_left(client: LlmClient, server: Any) -> None:
    def hang(_: BaseHTTPRequestHandler) -> None:
        server.closing.wait(5)

    server.replies = [hang] * 2
    with pytest.raises(RunError, match=r"2 tries came: no whole answer within 0\.1 s"):
        with_timeout(client, 0.1, retries=1).ask(PAIR)
    assert with_timeout(client, 5.0).ask(PAIR) == GOOD


def test_a_server_that_drips_is_left(client: LlmClient, server: Any) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(50):
            if not server.closing.wait(0.02):
                handler.wfile.write(b" ")

    server.replies = [drip]
    started = time.monotonic()
    with pytest.raises(RunError, match="no whole answer within"):
        with_timeout(client, 0.2, retries=0).ask(PAIR)
    assert time.monotonic() - started < 2


def test_a_server_that_drips_headers_is_left(client: LlmClient, server: Any) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        for _ in range(50):
            if not server.closing.wait(0.05):
                handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    server.replies = [drip]
    started = time.monotonic()
    with pytest.raises(RunError, match="no whole answer within"):
        with_timeout(client, 0.2, retries=0).ask(PAIR)
    assert time.monotonic() - started < 2


def test_a_server_that_drips_a_chunk_extension_is_left(client: LlmClient, server: Any) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(50):
            if not server.closing.wait(0.05):
                handler.wfile.write(b"1;" + b"a")

    server.replies = [drip]
    started = time.monotonic()
    with pytest.raises(RunError, match="no whole answer within"):
        with_timeout(client, 0.2, retries=0).ask(PAIR)
    assert time.monotonic() - started < 2


def test_a_proxy_that_cannot_be_used_is_named_without_its_password(
    client: LlmClient, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("ALL_PROXY", "foo://me:hunter2@host")
    with pytest.raises(ConfigError, match="the proxy in the environment cannot be used") as caught:
        client.ask(PAIR)
    assert "hunter2" not in str(caught.value)


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"--llm-url needs openai .*pip install '\.\[llm\]'"):
        LlmClient("http://x/v1", "m", key=None, timeout_s=1.0, retries=0, backoff_s=0.0)


def test_where_nobody_listens_it_says_so(client: LlmClient, waits: list[float]) -> None:
    nowhere = LlmClient(
        "http://127.0.0.1:9", "m", key=KEY, timeout_s=1.0, retries=1, backoff_s=1.0,
        sleep=waits.append,
    )  # fmt: skip
    with pytest.raises(RunError, match="no connection"):
        nowhere.ask(PAIR)
    assert waits == [1.0]


@pytest.mark.parametrize(
    ("code", "fix", "kind"),
    [
        (400, "check --llm-url and --llm-model", RunError),
        (401, "set CAPT_LLM_KEY to a key that is valid there", ConfigError),
        (403, "set CAPT_LLM_KEY to a key that may use tiny", ConfigError),
        (404, "it usually ends in /v1", ConfigError),
        (422, "check --llm-url and --llm-model", RunError),
    ],
)
def test_what_no_try_can_mend_fails_at_once(
    code: int, fix: str, kind: type[CaptError], client: LlmClient, server: Any
) -> None:
    server.replies = [http(code, '{"error": "no such\n\x1b[31mthing"}')]
    with pytest.raises(kind, match=rf"came HTTP {code}, '.*no such .+\[31mthing.*{fix}"):
        client.ask(PAIR)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(code: int, client: LlmClient, server: Any) -> None:
    other = type(server)()
    try:
        server.replies = [http(code, Location=f"{other.url}/chat/completions")]
        with pytest.raises(ConfigError, match=f"HTTP {code}.*redirects are not followed"):
            client.ask(PAIR)
        assert other.requests == []
        server.replies = [http(code, Location="http://[::1"), http(code)]
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"HTTP {code}"):
                client.ask(PAIR)
        assert len(server.requests) == 3
    finally:
        other.close()


def test_the_key_is_never_shown(client: LlmClient, server: Any) -> None:
    escaped = KEY.replace("/", "\\/")
    encoded = (quote(KEY, safe=""), KEY.replace("+", "\\u002b"), KEY.replace("+", "&#43;"))
    encoded += (
        f"{KEY[:9]}\n{KEY[9:]}",
        quote(quote(KEY, safe="")),
        "".join(f"%{ord(c):02x}" for c in KEY),
    )
    encoded += ("".join(f"\\u{ord(c):04X}" for c in KEY), "".join(f"\\x{ord(c):02x}" for c in KEY))
    encoded += (
        "".join(f"&#x{ord(c):x};" for c in KEY),
        "\u200b".join(KEY),
        KEY.swapcase(),
        KEY[::-1],
    )
    encoded += (KEY.encode().hex(), "".join(chr(ord(c) + 0xFEE0) for c in KEY), f"{KEY[2:11]}…")
    encoded += tuple(
        b64encode(f"{before}{KEY}:".encode()).decode() for before in ("", "me:", "you:")
    )
    long = "x" * 190 + KEY  # half of it would lie within the excerpt
    ending = KEY + "y" * 190
    for reply in (
        http(401, f"bad key {KEY}"),
        http(401, f'{{"error": "bad {escaped}"}}'),
        *(http(401, f"bad key {text}") for text in encoded),
        http(400, long),
        http(500, f"bad key {KEY}"),
        http(200, f"bad key {KEY}"),
        message(f"bad key {KEY}"),
        message(ending),
        answer(difference=[KEY]),
        lambda handler: handler.wfile.write(f"{KEY} {KEY}\r\n".encode()),
    ):
        server.replies = [reply] * 3
        with pytest.raises(CaptError) as caught:
            client.ask(PAIR)
        seen: BaseException | None = caught.value
        while seen is not None:
            for half in (KEY[:8], KEY[-8:], *encoded):
                assert half not in f"{seen!r} {seen}"
            seen = seen.__cause__
        server.replies = []
    assert KEY not in repr(client)


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError, match="CAPT_LLM_KEY: expected") as caught:
        LlmClient("http://x/v1", "m", key=key, timeout_s=1.0, retries=0, backoff_s=0.0)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "http://host:port/v1",
        "http://me:hunter2@host/v1",
        "http://host/v1?key=hunter2",
        "http://host/v1#x",
        "http://ho st/v1",
        "http://host/v1\n",
        "http://höst/v1",
        "http://host\\@other/v1",
        "http://[::1/v1",
    ],
)
def test_addresses_that_cannot_be_used_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"--llm-url: expected http") as caught:
        LlmClient(url, "m", key=None, timeout_s=1.0, retries=0, backoff_s=0.0)
    assert "hunter2" not in str(caught.value)

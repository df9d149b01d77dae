"""Sentences from a language model behind any OpenAI-compatible endpoint (METHOD 3)."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from capt_deploy.core.errors import ConfigError, RunError
from capt_deploy.core.version import __version__
from capt_train.confusion.sentences import Pair, PairSentences, clean
from capt_train.parts import SENTENCE_KINDS

KEY_VARIABLES = ("CAPT_LLM_KEY", "OPENAI_API_KEY")
_MAX_RESPONSE_BYTES = 2**20
_MAX_ANSWER_CHARACTERS = 100_000
_MAX_SENTENCES, _MAX_SENTENCE_CHARACTERS = 20, 400
_MAX_WAIT_S = 60.0  # between two tries, whatever the server asks for
_TRY_AGAIN = (408, 425, 429)  # and all from 500 on
# May be about this very prompt, as where a filter of contents refuses it; others may pass.
_THIS_PROMPT = (400, 413, 422)
_PROMPT = """\
A photo classifier keeps mistaking two classes for each other: "{a}" and "{b}".

Reason step by step first, in plain text and in a few lines:
1. What does each of the two look like in a photo: outline, proportions, parts, colours, surface, \
usual surroundings?
2. Which of these visible traits do both have, so that one passes for the other?
3. Which visible traits does only one of them have, and what has the other in its place?
Keep to what can be seen. Leave out behaviour, sound, smell, origin and use.

Then finish the message with exactly one JSON object and nothing after it:
{{"commonality": ["…"], "difference": ["…"]}}
"commonality" lists three to five sentences on what "{a}" and "{b}" share, "difference" three to \
five on how to tell one from the other. Each is one English sentence of at most 20 words that \
names both classes and can be understood alone."""


class _TryError(Exception):
    """One try failed in a way that another one may not."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def key_from_environment() -> str | None:
    """Return the key of the first of `KEY_VARIABLES` that is set; local servers need none."""
    return next(
        (value for name in KEY_VARIABLES if (value := os.environ.get(name, "").strip())), None
    )


@dataclass(frozen=True)
class LlmClient:
    """Asks one model at one address. The key is in no representation and no message."""

    url: str  # up to and including the version, as in http://localhost:8000/v1
    model: str
    _: KW_ONLY
    key: str | None = field(repr=False)
    timeout_s: float  # for a whole answer
    retries: int  # after the first try
    backoff_s: float  # before the first retry; doubles every time
    sleep: Callable[[float], object] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        if not _is_plain_url(self.url):
            raise ConfigError(
                "--llm-url: expected http(s)://host[:port]/path, such as "
                "http://localhost:8000/v1, without user name, ? and #; the key goes into "
                f"{KEY_VARIABLES[0]}"
            )  # what came is not repeated: it may hold a password
        if self.key is not None and not re.fullmatch("[!-~]+", self.key):
            raise ConfigError(
                f"{' or '.join(KEY_VARIABLES)}: expected a key of printable ASCII characters "
                f"without blanks; copy it again"
            )
        checks = [
            (bool(self.model.strip()), "--llm-model", "a name", self.model),
            (0 < self.timeout_s < 1e6, "llm timeout", "seconds above 0", self.timeout_s),
            (0 <= self.retries <= 20, "llm retries", "0 up to 20", self.retries),
            (self.backoff_s >= 0, "llm backoff", "seconds, 0 or more", self.backoff_s),
        ]
        for fine, name, expected, came in checks:
            if not fine:
                raise ConfigError(f"{name}: expected {expected}, came {came!r}")

    @property
    def endpoint(self) -> str:
        """The address that is posted to."""
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"

    def ask(self, pair: Pair) -> PairSentences:
        """Ask for the sentences of one pair, trying again where that can help.

        Raises:
            ConfigError: the server refuses address, key or model; no try can help.
            RunError: it refuses this prompt, or no usable answer came in any try.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._try(pair)
            except _TryError as error:
                failure = error
            if attempt < self.retries:
                wait_s = max(self.backoff_s * 2**attempt, failure.wait_s)
                self.sleep(min(wait_s, _MAX_WAIT_S))
        raise RunError(
            f"{self.endpoint}: expected sentences on {' and '.join(pair)}, but in "
            f"{self.retries + 1} tries came: {failure}; run again to go on"
        ) from None

    def _try(self, pair: Pair) -> PairSentences:
        body = self._post(prompt(pair))
        try:
            choice = json.loads(body)["choices"][0]
            text, cut_off = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            said = self._excerpt(body.decode("utf-8", "replace"))
            raise _TryError(f"no chat completion, but {said}") from None
        if cut_off:
            raise _TryError("an answer that the server's token limit cut off")
        text = text if isinstance(text, str) else ""
        sentences = _parse(text)
        if sentences is None:
            said = self._excerpt(text, ending=True)
            raise _TryError(f"a message that does not end with the JSON asked for, but {said}")
        # A shorter key is no secret but a placeholder such as "none", and may be a word.
        written = "\n".join(sentences.commonality + sentences.difference)
        if self.key and len(self.key) >= 8 and self.key in written:
            raise _TryError("sentences that hold the key")
        return sentences

    def _post(self, content: str) -> bytes:
        message = {"role": "user", "content": content}
        # No temperature: models that reason refuse any but their own. What repeats is the cache.
        data = {"model": self.model, "messages": [message]}
        headers = {"Content-Type": "application/json", "User-Agent": f"capt/{__version__}"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.endpoint, json.dumps(data).encode(), headers)
        deadline = time.monotonic() + self.timeout_s
        try:
            with _opener().open(request, timeout=self.timeout_s) as response:
                body = _read(response, _MAX_RESPONSE_BYTES + 1, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, deadline) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise _TryError(f"no whole answer within {self.timeout_s:g} s") from None
            raise _TryError(f"no connection: {self._excerpt(str(cause))}") from None
        if len(body) > _MAX_RESPONSE_BYTES:
            raise _TryError(f"more than {_MAX_RESPONSE_BYTES} bytes")
        return body

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        try:
            body = _read(error, _MAX_RESPONSE_BYTES, deadline)
            said = self._excerpt(body.decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            said = "nothing more"
        if error.code in _TRY_AGAIN or error.code >= 500:
            return _TryError(f"HTTP {error.code}, {said}", _retry_after_s(error.headers))
        fixes = {
            401: f"set {KEY_VARIABLES[0]} to a key that is valid there",
            403: f"set {KEY_VARIABLES[0]} to a key that may use {self.model}",
            404: f"check --llm-url (it usually ends in /v1) and whether it serves {self.model}",
        }
        fix = fixes.get(error.code, "check --llm-url and --llm-model")
        if error.code < 400:
            fix = "redirects are not followed, to keep the key; give the final address as --llm-url"
        kind = RunError if error.code in _THIS_PROMPT else ConfigError
        return kind(f"{self.endpoint}: expected an answer, came HTTP {error.code}, {said}; {fix}")

    def _excerpt(self, text: str, ending: bool = False) -> str:
        text = text.replace("\\/", "/")
        if self.key:  # some servers repeat it; hidden before the cut, which could leave half of it
            text = text.replace(self.key, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return repr(text[-200:] if ending else text[:200]) if text else "nothing"


def prompt(pair: Pair) -> str:
    """Return what is asked about a pair: to reason first, then to answer in JSON."""
    return _PROMPT.format(a=pair[0], b=pair[1])


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    # Printable ASCII but for ?, # and \; an @ before the path is a password's.
    return whole and "@" not in parts.netloc and bool(re.fullmatch(r"(?:(?![?#\\])[!-~])+", url))


def _opener() -> urllib.request.OpenerDirector:
    """Return the usual one but for redirects: these would carry the key to wherever they point."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(urllib.request.HTTPHandler())
    opener.add_handler(urllib.request.HTTPSHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    return opener


def _read(response: Any, limit: int, deadline: float) -> bytes:
    """Read up to `limit` bytes. A socket's own time-out starts anew with every packet."""
    body = bytearray()
    while len(body) < limit and (part := response.read1(limit - len(body))):
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


def _retry_after_s(headers: Message) -> float:
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text):
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _parse(text: str) -> PairSentences | None:
    """Read the last JSON object of a message, if it is of the very form that was asked for."""
    value = _last_object(text) if len(text) <= _MAX_ANSWER_CHARACTERS else None
    if not isinstance(value, dict) or {*value} != {*SENTENCE_KINDS}:
        return None
    for texts in value.values():
        if not isinstance(texts, list) or not 0 < len(texts) <= _MAX_SENTENCES:
            return None
        if not all(isinstance(text, str) and text.strip() for text in texts):
            return None
        if max(map(len, texts)) > _MAX_SENTENCE_CHARACTERS:
            return None
    return PairSentences(*(clean(value[kind]) for kind in SENTENCE_KINDS))


def _last_object(text: str) -> Any:
    """Return the last JSON object that stands for itself in a text; None without any."""
    decoder, found = json.JSONDecoder(), None
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except RecursionError:  # nobody answers like this, and each { would cost as much again
            return None
        except ValueError:
            end = start + 1
        start = text.find("{", end)
    return found

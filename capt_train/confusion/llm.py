"""Sentences about confused classes from any OpenAI-compatible endpoint (METHOD 3)."""

import html
import json
import os
import re
import time
import unicodedata
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from capt_deploy.core.errors import ConfigError, RunError
from capt_deploy.core.install import require_packages
from capt_deploy.core.version import __version__
from capt_train.confusion.sentences import NamePair, PairSentences, clean
from capt_train.parts import SENTENCE_KINDS

KEY_VARIABLE = "CAPT_LLM_KEY"
_SHORTEST_SECRET = 8  # characters; a shorter key is a placeholder such as "none"
_MOST_ESCAPES = 3  # one within the other, as %2541
_MAX_RESPONSE_BYTES = 2**20
_MAX_ANSWER_CHARACTERS = 100_000
_MAX_SENTENCES, _MAX_SENTENCE_CHARACTERS = 20, 400
_MAX_WAIT_S = 60.0  # between two tries, even if the server asks for more
_TRANSIENT = (408, 425, 429)  # HTTP codes that a retry may mend, as all from 500 on
# May concern this prompt alone, as where a content filter refuses it; others may pass.
_PROMPT_REFUSED = (400, 413, 422)
# The openai library fills these from the environment; another server must not see them.
_UNSENT_HEADERS = ("OpenAI-Organization", "OpenAI-Project")
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


class _RetryableError(Exception):
    """One try failed in a way that another one may not."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # that the server asks for before the next try


def key_from_environment() -> str | None:
    """Return the key in $CAPT_LLM_KEY; None where there is none, as local servers need none."""
    return os.environ.get(KEY_VARIABLE, "").strip() or None


@dataclass(frozen=True)
class LlmClient:
    """A language model at one address. Its key is in no representation and no message."""

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
                f"{KEY_VARIABLE}"
            )  # the address is not repeated: it may hold a password
        if self.key is not None and not re.fullmatch("[!-~]+", self.key):
            raise ConfigError(
                f"{KEY_VARIABLE}: expected a key of printable ASCII characters without blanks; "
                f"copy it again"
            )
        require_packages("--llm-url", "llm", "openai")

    @property
    def base_url(self) -> str:
        """Return the address without the path of chat completions."""
        return self.url.rstrip("/").removesuffix("/chat/completions")

    def ask(self, pair: NamePair) -> PairSentences:
        """Ask for the sentences of one pair, trying again where that can help.

        Not left to the retries of the openai library: an answer without sentences is worth another
        try as well, and both kinds of tries count together.

        Raises:
            ConfigError: the server refuses address, key or model; no try can help.
            RunError: it refuses this prompt, or no usable answer came in any try.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._sentences_in(self._post(prompt(pair)))
            except _RetryableError as error:
                failure = error
            if attempt < self.retries:
                self.sleep(min(max(self.backoff_s * 2**attempt, failure.wait_s), _MAX_WAIT_S))
        raise RunError(
            f"{self.base_url}: expected sentences on {' and '.join(pair)}, but in "
            f"{self.retries + 1} tries came: {failure}; run again to go on"
        ) from None

    def _post(self, content: str) -> bytes:
        """Return the body of the model's answer to a prompt."""
        import openai
        from anyio.from_thread import start_blocking_portal

        try:
            # A separate event loop, for a notebook runs one already; leaving the block cancels it.
            with start_blocking_portal() as portal:
                return portal.call(self._complete, content)
        except (TimeoutError, openai.APITimeoutError):
            raise _RetryableError(f"no whole answer within {self.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            reason = self._excerpt(str(error.__cause__ or error))
            raise _RetryableError(f"no connection: {reason}") from None

    async def _complete(self, content: str) -> bytes:
        """Send one prompt; return the answer's body, its size and total time limited."""
        import openai
        from anyio import fail_after

        body = bytearray()

        async def read(response: Any) -> None:
            """Read the body before the openai library does, which sets no limit to its size."""
            encoding = response.headers.get("Content-Encoding", "")
            if encoding.lower() not in ("", "identity"):  # a few bytes could unpack to gigabytes
                raise _RetryableError(f"an answer packed as {self._excerpt(encoding)}, unasked for")
            async for part in response.aiter_raw():
                body.extend(part)
                if len(body) > _MAX_RESPONSE_BYTES:
                    raise _RetryableError(f"more than {_MAX_RESPONSE_BYTES} bytes")
            if not response.is_success:
                raise self._refusal(response.status_code, bytes(body), response.headers)

        unsent = _UNSENT_HEADERS if self.key else (*_UNSENT_HEADERS, "Authorization")
        headers = {"User-Agent": f"capt/{__version__}", "Accept-Encoding": "identity"}
        # The time limit of the library starts anew with every packet.
        with fail_after(self.timeout_s):
            async with openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=self.key or "none",  # that is not sent
                timeout=self.timeout_s,
                max_retries=0,
                http_client=self._transport(read),
            ) as client:
                # No temperature: reasoning models refuse any but their own.
                request = client.chat.completions.with_streaming_response.create(
                    model=self.model,
                    messages=[{"role": "user", "content": content}],
                    extra_headers={**headers, **dict.fromkeys(unsent, openai.Omit())},
                )
                async with request:
                    return bytes(body)

    def _transport(self, read: Callable[[Any], Any]) -> Any:
        """Return the library's HTTP client, but one that would not carry the key elsewhere."""
        import openai

        try:
            return openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [read]}
            )
        except (ImportError, ValueError):  # an error that may show a password of the proxy
            raise ConfigError(
                f"{self.base_url}: the proxy in the environment cannot be used; expected "
                f"http://host:port in HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, or set NO_PROXY"
            ) from None

    def _refusal(self, code: int, body: bytes, headers: Mapping[str, str]) -> Exception:
        excerpt = self._excerpt(body.decode("utf-8", "replace"))
        if code in _TRANSIENT or code >= 500:
            return _RetryableError(f"HTTP {code}, {excerpt}", _retry_after_s(headers))
        fixes = {
            401: f"set {KEY_VARIABLE} to a key that is valid there",
            403: f"set {KEY_VARIABLE} to a key that may use {self.model}",
            404: f"check --llm-url (it usually ends in /v1) and whether it serves {self.model}",
        }
        fix = fixes.get(code, "check --llm-url and --llm-model")
        if code < 400:
            fix = "redirects are not followed, to keep the key; give the final address as --llm-url"
        kind = RunError if code in _PROMPT_REFUSED else ConfigError
        return kind(f"{self.base_url}: expected an answer, came HTTP {code}, {excerpt}; {fix}")

    def _sentences_in(self, body: bytes) -> PairSentences:
        """Return the sentences in a chat completion."""
        try:
            choice = json.loads(body)["choices"][0]
            text, cut_off = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            excerpt = self._excerpt(body.decode("utf-8", "replace"))
            raise _RetryableError(f"no chat completion, but {excerpt}") from None
        if cut_off:
            raise _RetryableError("an answer that the server's token limit cut off")
        text = text if isinstance(text, str) else ""
        sentences = _parse(text)
        if sentences is None:
            excerpt = self._excerpt(text, ending=True)
            raise _RetryableError(
                f"a message that does not end with the JSON asked for, but {excerpt}"
            )
        if self._holds_key("\n".join(sentences.commonality + sentences.difference), whole=True):
            raise _RetryableError("sentences that hold the key")
        return sentences

    def _excerpt(self, text: str, ending: bool = False) -> str:
        """Return the beginning or ending of a text for a message, unless the key is in the text."""
        if self._holds_key(text):
            return f"a text that repeats the key of {KEY_VARIABLE}"
        text = " ".join(text.split())
        return repr(text[-200:] if ending else text[:200]) if text else "nothing"

    def _holds_key(self, text: str, *, whole: bool = False) -> bool:
        """Tell whether a text holds the key or a part of it, as it is or in a usual encoding.

        Words of a sentence may well be parts of a key such as "sk-no-key-required".
        """
        if self.key is None or len(self.key) < _SHORTEST_SECRET:
            return False
        key, folded = self.key.encode(), _folded(text)
        forms = [key.decode(), key.decode()[::-1], key.hex()]
        # Base64 differs by the place of the key in what is encoded; its ends hold neighbours.
        forms += [b64encode(bytes(shift) + key).decode()[shift and 4 : -4] for shift in range(3)]
        return any(
            form[start : start + length] in folded
            for form in map(_folded, forms)
            for length in [len(form) if whole else _SHORTEST_SECRET]
            for start in range(len(form) - length + 1)
        )


def _folded(text: str) -> str:
    """Return a text without escapes (JSON, URL, HTML), blanks and case, in printable ASCII."""
    for _ in range(_MOST_ESCAPES):
        text = re.sub(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))", _character, text)
        text = unquote(html.unescape(text))
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[^!-\[\]-~]", "", text)  # nor backslashes


def _character(code: re.Match[str]) -> str:
    return chr(int(code[1] or code[2], 16))


def prompt(pair: NamePair) -> str:
    """Return the question about a pair: to reason first, then to answer in JSON."""
    return _PROMPT.format(a=pair[0], b=pair[1])


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    # Printable ASCII but for ?, # and \; an @ before the path is a password's.
    return whole and "@" not in parts.netloc and bool(re.fullmatch(r"(?:(?![?#\\])[!-~])+", url))


def _retry_after_s(headers: Mapping[str, str]) -> float:
    try:
        return float(headers.get("Retry-After", 0.0))
    except ValueError:
        return 0.0


def _parse(text: str) -> PairSentences | None:
    """Return the sentences of a message whose last JSON object is of the form asked for."""
    value = _last_object(text) if len(text) <= _MAX_ANSWER_CHARACTERS else None
    if not isinstance(value, dict) or {*value} != {*SENTENCE_KINDS}:
        return None
    for texts in value.values():
        if not isinstance(texts, list) or not 0 < len(texts) <= _MAX_SENTENCES:
            return None
        for sentence in texts:
            if not isinstance(sentence, str) or not sentence.strip():
                return None
            if len(sentence) > _MAX_SENTENCE_CHARACTERS:
                return None
    return PairSentences(*(clean(value[kind]) for kind in SENTENCE_KINDS))


def _last_object(text: str) -> Any:
    """Return the last JSON object in a text that is in no other one; None without any."""
    decoder, last = json.JSONDecoder(), None
    start = text.find("{")
    while start >= 0:
        try:
            last, end = decoder.raw_decode(text, start)
        except RecursionError:  # no usable answer is so deep, and each { would cost as much again
            return None
        except ValueError:
            end = start + 1
        start = text.find("{", end)
    return last

"""GET with patience and with bounds: retries, pauses, and errors that name the host alone."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests

logger = logging.getLogger(__name__)

WORTH_A_RETRY = (429, 500, 502, 503, 504)
LARGEST_REPLY = 64 << 20
"""Bytes of one reply, unpacked; a page of EIA has about 1 MB, a month of OASIS less."""

CHUNK_BYTES = 4096
PORTS = {"http": 80, "https": 443}


class SourceError(RuntimeError):
    """A source gave no usable data; the message says which, why, and what to do."""


class WrongKeyError(SourceError):
    """The source refuses the key."""


class EmptyRangeError(SourceError):
    """The source has no rows in the range."""


@dataclass(frozen=True)
class Reply:
    """The whole of a reply that came in time."""

    status: int
    content_type: str
    body: bytes
    location: str | None  # where a redirect leads
    retry_after: str

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ValueError: it is none, or nests too deeply.
        """
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("JSON that nests too deeply") from None


class _TooLarge(Exception):
    """A reply of more than `LARGEST_REPLY` bytes; not worth another try."""


class _Trouble(Exception):
    """No reply this time; the text is one of our own, without a URL or a header."""


@dataclass
class PatientHttp:
    """Waits between calls and tries again, within bounds of size and time.

    Redirects are followed only to the same scheme, host and port, and once: a header may hold a
    key, which is meant for that one place.

    Args:
        timeout_seconds: without a byte.
        reply_seconds: for the whole of one reply, however slowly its bytes come.
        longest_pause_seconds: a server that asks for more is not waited for.
        largest_reply: bytes of one reply, unpacked.
    """

    spacing_seconds: float = 0.0
    retries: int = 5
    backoff_seconds: float = 1.0
    timeout_seconds: float = 60.0
    reply_seconds: float = 300.0
    longest_pause_seconds: float = 300.0
    largest_reply: int = LARGEST_REPLY
    sleep: Callable[[float], None] = time.sleep
    session: requests.Session = field(default_factory=requests.Session)
    _last_call: float = field(default=float("-inf"), init=False)

    def get(
        self, url: str, params: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> Reply:
        """The reply, whatever its status, once it is not one of `WORTH_A_RETRY`.

        Raises:
            SourceError: no reply, or none but those, after all retries; one that is too large, or
                leads elsewhere; a pause longer than `longest_pause_seconds`.
        """
        host = urlsplit(url).hostname
        trouble = ""
        for attempt in range(self.retries + 1):
            if attempt:
                logger.warning("%s: %s; try %d of %d", host, trouble, attempt, self.retries)
            self._wait_for_turn()
            pause = 0.0
            try:
                reply = self._follow(url, params, headers)
            except _TooLarge:
                raise SourceError(
                    f"{host} sends more than {self.largest_reply:,} bytes in one reply; ask for a "
                    "shorter range."
                ) from None
            except _Trouble as error:
                trouble = str(error)
            else:
                if reply.status not in WORTH_A_RETRY:
                    return reply
                trouble = f"HTTP {reply.status}"
                pause = _seconds(reply.retry_after)
                if pause > self.longest_pause_seconds:
                    raise SourceError(
                        f"{host} answers HTTP {reply.status} and asks for a pause of more than "
                        f"{self.longest_pause_seconds:.0f} s; try again later."
                    )
            if attempt < self.retries:
                self.sleep(max(pause, self.backoff_seconds * 2**attempt))
        raise SourceError(
            f"{host} gave no answer in {self.retries + 1} tries, last: {trouble}; try again later."
        )

    def _follow(
        self, url: str, params: Mapping[str, str] | None, headers: Mapping[str, str] | None
    ) -> Reply:
        """The reply, or that of the same origin where it leads to."""
        reply = self._in_time(url, params, headers)
        if reply.location is None:
            return reply
        if _origin(reply.location) != _origin(url):
            raise SourceError(
                f"{urlsplit(url).hostname} redirects to another host, port or scheme, where this "
                "request was not meant for; check the url."
            )
        return self._in_time(reply.location, None, headers)

    def _in_time(
        self, url: str, params: Mapping[str, str] | None, headers: Mapping[str, str] | None
    ) -> Reply:
        """One request, in a thread of its own: neither headers nor a body that drip, nor a name
        that is not resolved, can hold the caller for longer than `reply_seconds`."""
        over = threading.Event()
        outcome: list[Reply | Exception] = []

        def ask() -> None:
            try:
                outcome.append(self._ask(url, params, headers, over))
            except (_Trouble, _TooLarge) as error:
                outcome.append(error)
            except Exception as error:  # must reach the caller, not the thread's own report
                # Its text may hold the URL or a header.
                outcome.append(_Trouble(type(error).__name__))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self.reply_seconds)
        if not outcome:
            over.set()
            self.session = requests.Session()  # the thread may still be within the old one
            raise _Trouble(f"no whole reply in {self.reply_seconds:g} s")
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _ask(
        self,
        url: str,
        params: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        over: threading.Event,
    ) -> Reply:
        with self.session.get(
            url,
            params=params,
            headers=headers,
            timeout=self.timeout_seconds,
            allow_redirects=False,
            stream=True,
        ) as reply:
            body = bytearray()
            for chunk in reply.iter_content(CHUNK_BYTES):
                body += chunk
                if len(body) > self.largest_reply:
                    raise _TooLarge
                if over.is_set():
                    raise _Trouble("given up")
            leads_to = reply.next.url if reply.is_redirect and reply.next is not None else None
            return Reply(
                reply.status_code,
                reply.headers.get("Content-Type", "nothing"),
                bytes(body),
                leads_to,
                reply.headers.get("Retry-After", ""),
            )

    def _wait_for_turn(self) -> None:
        pause = self._last_call + self.spacing_seconds - time.monotonic()
        if pause > 0:
            self.sleep(pause)
        self._last_call = time.monotonic()


def _origin(url: str) -> tuple[str, str | None, int | None] | None:
    """Scheme, host and port; None of a URL whose port is not a number."""
    parts = urlsplit(url)
    try:
        return parts.scheme, parts.hostname, parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return None


def _seconds(retry_after: str) -> float:
    """Seconds of a Retry-After header; 0 where it has none, or a date."""
    return float(retry_after) if re.fullmatch("[0-9]+", retry_after) else 0.0

"""GET with patience: retries, pauses, and errors that name the host and never a key."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests

logger = logging.getLogger(__name__)

WORTH_A_RETRY = (429, 500, 502, 503, 504)


class SourceError(RuntimeError):
    """A source gave no usable data; the message says which, why, and what to do."""


class WrongKeyError(SourceError):
    """The source refuses the key."""


class EmptyRangeError(SourceError):
    """The source has no rows in the range."""


@dataclass
class PatientHttp:
    """A requests session that waits between calls and tries again.

    Redirects are followed only to the same host: a header may hold a key.
    """

    spacing_seconds: float = 0.0
    retries: int = 5
    backoff_seconds: float = 1.0
    timeout_seconds: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    session: requests.Session = field(default_factory=requests.Session)
    _last_call: float = field(default=float("-inf"), init=False)

    def get(
        self, url: str, params: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> requests.Response:
        """The reply, whatever its status, once it is not one of `WORTH_A_RETRY`.

        Raises:
            SourceError: no reply, or none but those, after all retries.
        """
        host = urlsplit(url).hostname
        trouble = ""
        for attempt in range(self.retries + 1):
            if attempt:
                logger.warning("%s: %s; try %d of %d", host, trouble, attempt, self.retries)
            self._wait_for_turn()
            try:
                reply = self._get(url, params, headers)
            except requests.RequestException as error:
                trouble = type(error).__name__  # its text holds the URL
                pause = 0.0
            else:
                if reply.status_code not in WORTH_A_RETRY:
                    return reply
                trouble = f"HTTP {reply.status_code}"
                pause = _retry_after(reply)
            if attempt < self.retries:
                self.sleep(max(pause, self.backoff_seconds * 2**attempt))
        raise SourceError(
            f"{host} gave no answer in {self.retries + 1} tries, last: {trouble}; try again later."
        )

    def _get(
        self, url: str, params: Mapping[str, str], headers: Mapping[str, str] | None
    ) -> requests.Response:
        options: dict[str, Any] = {
            "headers": headers,
            "timeout": self.timeout_seconds,
            "allow_redirects": False,
        }
        reply = self.session.get(url, params=params, **options)
        if reply.is_redirect and reply.next is not None and reply.next.url is not None:
            if urlsplit(reply.next.url).hostname != urlsplit(url).hostname:
                raise SourceError(f"{urlsplit(url).hostname} redirects to another host.")
            reply = self.session.get(reply.next.url, **options)
        return reply

    def _wait_for_turn(self) -> None:
        pause = self._last_call + self.spacing_seconds - time.monotonic()
        if pause > 0:
            self.sleep(pause)
        self._last_call = time.monotonic()


def _retry_after(reply: requests.Response) -> float:
    """Seconds of a Retry-After header; 0 where it has none, or a date."""
    value = reply.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0

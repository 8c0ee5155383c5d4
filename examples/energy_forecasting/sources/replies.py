"""Values out of a reply that may hold anything: as announced, or a SourceError that says what not.

Nothing of a reply is trusted: neither its types nor its sizes, nor that it keeps a secret.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import numpy as np

from examples.energy_forecasting.sources.http import SourceError

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
HOUR_TEXT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d)(:00(:00)?)?(Z|[+-]00:00)?", re.ASCII)
LONGEST_QUOTE = 200
"""Characters of a reply that an error shows."""

SECRET_PART = 6
"""So many characters of a key in a row are hidden wherever they stand."""


def finite_number(value: object, what: str) -> float:
    """A number, or a text that is one.

    Raises:
        SourceError: it is neither, or not finite.
    """
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        number = float(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    else:
        number = math.nan
    if not math.isfinite(number):
        raise SourceError(f"{what} must be a finite number, got {shown(value)}.")
    return number


def whole_number(value: object, what: str, *, largest: int) -> int:
    """An integer from 0 to `largest`, or a text that is one.

    Raises:
        SourceError: it is none.
    """
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}", value.strip()):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise SourceError(f"{what} must be an integer from 0 to {largest:,}, got {shown(value)}.")
    return value


def full_hour(value: object, what: str, first: np.datetime64, last: np.datetime64) -> np.datetime64:
    """The UTC hour of a text such as 2024-01-31T05 or 2024-01-31T05:00:00-00:00.

    Raises:
        SourceError: it is none, or not one from `first` to `last`.
    """
    match = HOUR_TEXT.fullmatch(value) if isinstance(value, str) else None
    try:
        hour = np.datetime64(match[1], "h") if match else None
    except ValueError:  # February 30th
        hour = None
    if hour is None or not first <= hour <= last:
        raise SourceError(
            f"{what} must be a full UTC hour from {first} to {last}, got {shown(value)}."
        )
    return hour


def shown(value: object) -> str:
    """A value of a reply, short enough for an error."""
    if isinstance(value, (list, dict)):  # which may nest deeper than repr can follow
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


@contextmanager
def hidden_in_errors(secret: str) -> Iterator[None]:
    """No error that leaves the block shows the secret, whatever a reply put into it."""
    try:
        yield
    except Exception as error:
        error.args = tuple(hide(x, secret) if isinstance(x, str) else x for x in error.args)
        raise


def hide(text: str, secret: str) -> str:
    """The text with *** for the secret and for every longer part of it, also where it is written
    in capitals, escaped, as in a URL, or in base64."""
    covered = [False] * len(text)
    low = text.lower()
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")}
    forms.add(base64.b64encode(secret.encode()).decode())
    for form in {form.lower() for form in forms}:
        width = min(SECRET_PART, len(form))
        for start in range(len(form) - width + 1):
            at = low.find(form[start : start + width])
            while at >= 0:
                covered[at : at + width] = [True] * width
                at = low.find(form[start : start + width], at + 1)
    if not any(covered):
        return text
    if len(low) != len(text):  # some letter has another length in small: places do not match
        return "***"
    kept: list[str] = []
    for character, is_covered in zip(text, covered, strict=True):
        if not is_covered:
            kept.append(character)
        elif not kept or kept[-1] != "***":
            kept.append("***")
    return "".join(kept)

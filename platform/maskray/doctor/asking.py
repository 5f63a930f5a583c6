"""Questions over HTTP that are answered within seconds, or not at all."""

from __future__ import annotations

import os
import re
from email.utils import parsedate_to_datetime
from http.client import HTTPResponse
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

SECONDS = 3.0


def asked(url: str, headers: dict[str, str] | None = None) -> HTTPResponse | HTTPError:
    """The answer of a server, a refusal too.

    Raises:
        OSError: none.
    """
    try:
        found = urlopen(Request(url, headers=headers or {}), timeout=SECONDS)
    except HTTPError as refusal:
        return refusal
    assert isinstance(found, HTTPResponse)
    return found


def date_at(url: str) -> float | None:
    """Seconds since 1970 by the clock of a server, to the second; None where it does not say. Raises as `asked`."""
    with asked(url) as answer:
        date = answer.headers.get("Date")
    return None if date is None else parsedate_to_datetime(date).timestamp()


def s3_endpoint(uri: str) -> str:
    """The URL that requests for an `s3://` place go to."""
    options = parse_qs(urlsplit(uri).query)
    given = options.get("endpoint_override", [os.environ.get("AWS_ENDPOINT_URL", "")])[0]
    if given:
        return given if re.match("https?://", given) else f"{options.get('scheme', ['https'])[0]}://{given}"
    region = options.get("region", [os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "us-east-1")])
    return f"https://s3.{region[0]}.amazonaws.com"

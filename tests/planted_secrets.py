"""Secrets for tests: planted in the environment and in URIs, and looked for in all that is left behind."""

from __future__ import annotations

import base64
import io
import json
import secrets
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

from maskray.data.storage import Storage

NAMES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
         "MLFLOW_FLASK_SERVER_SECRET_KEY", "PGPASSWORD", "RAY_AUTH_TOKEN")  # fmt: skip
"""Variables that are a secret."""
IN_A_URI = {
    "MLFLOW_TRACKING_URI": "http://planted:{}@127.0.0.1:9/",
    "MLFLOW_REGISTRY_URI": "http://planted:{}@127.0.0.1:9/",
    "MLFLOW_BACKEND_STORE_URI": "postgresql://planted:{}@127.0.0.1:9/mlflow",
}
"""Variables that hold one, as another program on the same machine may need them: our runs do not use them."""
_ZIP = b"PK\x03\x04"


def new_secret(name: str) -> str:
    """With letters in it that base64, URLs and JSON each write in another way; but for what goes into headers as it is.

    Of a URI, or of a variable of that name.
    """
    if name == "RAY_AUTH_TOKEN":
        return secrets.token_hex(32)
    if name.startswith(("AWS_", "MLFLOW_TRACKING_TOKEN")):  # what AWS and bearers have
        return f"{secrets.token_hex(9)}/+{secrets.token_hex(9)}"
    return f'{secrets.token_hex(8)}"\\/é&{secrets.token_hex(8)}'


class Planted:
    """Secrets in a process's environment, and one for each URI that is asked for."""

    def __init__(self) -> None:
        self.secrets = {name: new_secret(name) for name in NAMES}
        self.variables = dict(self.secrets)
        for name, uri in IN_A_URI.items():
            self.variables[name] = self._planted(name, uri)

    def within(self, uri: str, name: str) -> str:
        """`scheme://host` with a user, and a new password that goes by that name."""
        scheme, _, rest = uri.partition("://")
        return self._planted(name, f"{scheme}://planted:{{}}@{rest}")

    def _planted(self, name: str, template: str) -> str:
        self.secrets[name] = new_secret(name)
        return template.format(quote(self.secrets[name], safe=""))

    def found_in(self, content: bytes) -> list[str]:
        """Which of them, and how they are written there."""
        hits = [
            f"{name}, {how}" for name, secret in self.secrets.items() for how, form in forms(secret) if form in content
        ]
        if content.startswith(_ZIP):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for member in archive.namelist():
                    hits += [f"{hit}, in {member}" for hit in self.found_in(archive.read(member))]
        return hits

    def found_below(self, places: Iterable[Path | Storage]) -> tuple[int, list[str]]:
        """Files that were searched, and each hit with its place."""
        searched, hits = 0, []
        for place in places:
            for name, read in _files(place):
                searched += 1
                hits += [f"{name}: {hit}" for hit in [*self.found_in(read()), *self.found_in(name.encode())]]
        return searched, hits


def forms(secret: str) -> Iterator[tuple[str, bytes]]:
    """A secret as it may be written, by how: each is enough to get it back."""
    raw = secret.encode()
    yield "raw", raw
    for shift in range(3):
        # What stands before it decides on the first letter, what comes after on the last: only those between are its.
        first, last = -(-8 * shift // 6), 8 * (shift + len(raw)) // 6
        for how, encode in (("base64", base64.b64encode), ("base64 for URLs", base64.urlsafe_b64encode)):
            yield f"{how}, shifted by {shift}", encode(b"\0" * shift + raw)[first:last]
    yield "hex", raw.hex().encode()
    # `safe` as different libraries have it.
    for function in (quote, quote_plus):
        for safe in ("", "/"):
            encoded = function(secret, safe=safe)
            yield "URL-encoded", encoded.encode()
            yield "URL-encoded in small letters", _small_escapes(encoded).encode()
    for ascii_only in (True, False):
        once = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        yield "JSON", once.encode()
        yield "JSON in JSON", json.dumps(once, ensure_ascii=ascii_only)[1:-1].encode()
    yield "as Python shows it", repr(secret)[1:-1].encode()
    yield "as Python shows bytes", repr(raw)[2:-1].encode()


def _small_escapes(encoded: str) -> str:
    head, *rest = encoded.split("%")
    return "%".join([head, *(part[:2].lower() + part[2:] for part in rest)])


def _files(place: Path | Storage) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if isinstance(place, Path):
        for path in sorted(p for p in [place, *place.rglob("*")] if p.is_file() and not p.is_symlink()):
            yield str(path), path.read_bytes
        return
    for name in place.list_names():
        child = place.child(name)
        if name in place.list_sizes():
            yield child.uri, lambda name=name: place.read_bytes(name)  # type: ignore[misc]
        else:
            yield from _files(child)

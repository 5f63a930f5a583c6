"""What a check of a manifest says, and what all checks share."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which rule, where in the file, and what to do."""

    rule: str
    where: str
    says: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.where}: {self.says}"


class Model(BaseModel):
    """The part of a format that our files use: what is not in it is taken for a slip of the pen."""

    model_config = ConfigDict(extra="forbid", strict=True)


SECRET = re.compile(r"PASSWORD|TOKEN(?!_PATH)|SECRET|(?:^|_)KEY(?:_ID)?$|CREDENTIAL", re.IGNORECASE)
"""In the name of a variable whose value nobody may read in a file."""
_LOGIN = re.compile(r"\w+://[^\s/:@]*:[^\s/@$]+@")


def misfits(error: ValidationError, prefix: str = "") -> Iterator[Finding]:
    """What pydantic has to say, by the dotted path."""
    for part in error.errors(include_url=False):
        where = ".".join(str(key) for key in part["loc"])
        rule = {"extra_forbidden": "unknown-field", "missing": "missing-field"}.get(part["type"], "wrong-value")
        yield Finding(rule, f"{prefix}{where}", part["msg"])


def check_image(where: str, image: str) -> Iterator[Finding]:
    """An image that is another one tomorrow."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and (not tag or tag == "latest" or tag.startswith("latest-")):
        yield Finding("image-tag", where, f"{image} names no version: give a tag that stays, or a digest")


def check_plain_secret(where: str, name: str, value: str | None) -> Iterator[Finding]:
    """A secret that stands in the file."""
    if value is not None and SECRET.search(name):
        yield Finding("plain-secret", where, f"{name} has its value in the file: refer to a Secret or to a variable")


def check_logins(where: str, node: Any) -> Iterator[Finding]:
    """Addresses with a password in them, anywhere below a node."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from check_logins(f"{where}.{key}" if where else str(key), value)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from check_logins(f"{where}.{index}", value)
    elif isinstance(node, str) and _LOGIN.search(node):
        yield Finding("plain-secret", where, "an address with a password in it")


def check_mlflow_server(where: str, arguments: list[str]) -> Iterator[Finding]:
    """The command line of `mlflow server`: who may ask it, under which name, and where things lie."""
    options = dict(argument.partition("=")[::2] for argument in arguments)
    if options.get("--app-name") != "basic-auth":
        yield Finding(
            "open-auth", where, "without --app-name=basic-auth whoever reaches the server may change all of it"
        )
    for option, missing in (("--allowed-hosts", True), ("--cors-allowed-origins", False)):
        if options.get(option, "" if missing else "given elsewhere").strip() in ("", "*"):
            yield Finding(
                "open-hosts", where, f"{option} must name the hosts: any other lets web pages reach the server"
            )
    if "--disable-security-middleware" in options:
        yield Finding("open-hosts", where, "--disable-security-middleware answers to every host name")
    if not options.get("--backend-store-uri", "").startswith("postgresql+psycopg2://"):
        yield Finding(
            "store",
            where,
            "--backend-store-uri must be postgresql+psycopg2://…: SQLite serves one machine, and "
            "SQLAlchemy 2.1 takes another driver where none is named",
        )
    if not options.get("--artifacts-destination", "").startswith(("s3://", "${")):
        yield Finding(
            "store", where, "--artifacts-destination must be a bucket: a folder of the container goes with it"
        )


def check_accounts(text: str) -> Iterator[Finding]:
    """What MLflow's `auth.ini` lets people do, and what it gives away."""
    known = {
        "default_permission", "database_uri", "admin_username", "admin_password", "authorization_function",
        "grant_default_workspace_access",
    }  # fmt: skip
    file = configparser.ConfigParser()
    file.read_string(text)
    options = dict(file["mlflow"])
    for name in sorted(options.keys() - known):
        yield Finding("unknown-field", name, "MLflow knows no such option")
    if "admin_password" in options:
        yield Finding("plain-secret", "admin_password", "leave it to MLFLOW_AUTH_ADMIN_PASSWORD")
    yield from check_logins("", options)
    if not options.get("database_uri", "").startswith("postgresql+psycopg2://"):
        yield Finding("store", "database_uri", "must be postgresql+psycopg2://…: SQLite in a container goes with it")
    if options.get("default_permission") not in ("READ", "USE", "NO_PERMISSIONS"):
        yield Finding("open-auth", "default_permission", "READ at most: every account could change every run")

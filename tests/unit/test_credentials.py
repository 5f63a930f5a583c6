"""What is secret, and texts without it."""

import ast
import dataclasses
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.train.v2._internal.state.schema import _to_json_serializable_value

from maskray.config.load import dump, load_text, parse, with_overrides, written
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.config.sweep import SweepConfig
from maskray.credentials import NAMED, Hidden, are_in, shown
from maskray.data.sources import open_source
from maskray.data.storage import Storage
from maskray.errors import (
    BadStepError,
    ConfigError,
    DataError,
    MaskrayError,
    StorageError,
    TrackingError,
    TrainingError,
)
from maskray.tracking.mlflow_runs import flatten
from maskray.tracking.mlflow_store import Store, open_store
from planted_secrets import Planted, forms

PASSWORD = "p4ss"
WITH_CREDENTIALS = [
    f"http://me:{PASSWORD}@host:5000/x",
    f"https://me:{PASSWORD}@host",
    f"postgresql://me:{PASSWORD}@host/db",
    f"postgresql+psycopg2://me:{PASSWORD}@host:5432/db",
    f"mysql://:{PASSWORD}@host/db",
    f"s3://AKIA:{PASSWORD}@bucket/prefix",
    f"http://me:a@{PASSWORD}@host",
    f"http://me:a/{PASSWORD}@host",
    f"http://me:a:{PASSWORD}@host",
    f"http://me:a'{PASSWORD}\"@host",
    f"http://me:12{PASSWORD}@host",
    f"postgresql://host/db?user=me&password={PASSWORD}",
    f"postgresql://host/db?sslpassword={PASSWORD}&sslmode=require",
    f"s3://bucket/prefix?region=x&secret_key={PASSWORD}",
    f"https://host/path?X-Amz-Security-Token={PASSWORD}#here",
    f"https://host/path?api_key={PASSWORD}",
    f"mysql://host/db?passwd={PASSWORD}",
    f"mssql://host/db?pwd={PASSWORD}&x=1",
    f"https://host/path?a=b&auth={PASSWORD}",
]
WITHOUT = [
    "http://host:5000/path@here",
    "http://host:5000",
    "s3://bucket/a:b@c",
    "s3://bucket/prefix?region=us-east-1&endpoint_override=127.0.0.1:9000",
    "models:/name@champion",
    "sqlite:////absolute/path.db",
    "/a/path/with@sign:and=more",
    "postgresql://me@host/db",
    "Found: http://127.0.0.1:9 (refused). Ask me@example.org",
    "tokenizer=x?tokenizer=words",
    "https://host/path?author=me&auth_mode=basic&bypass=1",
]


@pytest.mark.parametrize("uri", WITH_CREDENTIALS)
def test_no_password_is_shown(uri: str):
    assert are_in(uri)
    assert PASSWORD not in shown(uri)
    text = f"API request to {uri} failed: {uri!r} (refused)"
    assert PASSWORD not in shown(text)
    assert shown(text).endswith("(refused)")
    assert shown(shown(uri)) == shown(uri)


@pytest.mark.parametrize("text", WITHOUT)
def test_what_has_none_stays_as_it_is(text: str):
    assert not are_in(text)
    assert shown(text) == text.replace("//me@", "//***@")


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "my_password", "RAY_AUTH_TOKEN", "OPENAI_API_KEY", "APIKEY"),
        *("DB_PASSWD", "DB_PASS", "pass", "REDIS_PASS_FILE", "MYSQL_PWD", "SSH_PASSPHRASE", "PASSCODE"),
        *("AWS_CREDENTIALS", "GCP_CREDS", "AZURE_STORAGE_CONNECTION_STRING"),
        *("REDIS_AUTH", "auth", "HTTP_AUTHORIZATION"),
    ],
)
def test_names_of_secrets(name: str):
    assert NAMED.search(name)


@pytest.mark.parametrize(
    "name",
    [
        *("TOKENIZERS_PARALLELISM", "MLFLOW_TRACKING_USERNAME", "AWS_REGION", "PYTHONHASHSEED", "KEYBOARD", "KEYWORDS"),
        *("BYPASS_CACHE", "COMPASS", "PASSENGERS", "PWD", "OLDPWD"),
        *("AUTHOR", "GIT_AUTHOR_NAME", "RAY_AUTH_MODE", "MLFLOW_TRACKING_AUTH"),
    ],
)
def test_names_of_none(name: str):
    assert not NAMED.search(name)


# ----------------------------------------------------------------------------------------------------------- our errors


@pytest.mark.parametrize("uri", WITH_CREDENTIALS)
def test_errors_do_not_say_it(uri: str):
    error = MaskrayError(f"wrong: {uri}", key="key", found=uri, allowed="another", fix=f"mlflow db upgrade {uri}")
    for each in (error, pickle.loads(pickle.dumps(error)), TrainingError(f"at {uri}"), BadStepError(uri, 1, 2, "nan")):
        assert PASSWORD not in f"{each} {each!r} {each.args}"
    assert PASSWORD not in f"{error.problem} {error.found} {error.fix}"


def test_what_was_found_stays_a_number():
    assert MaskrayError("wrong", found=3).found == 3
    assert str(MaskrayError("wrong", found=0)) == "wrong. Found: 0."


def test_a_password_that_is_wrong_is_not_repeated():
    planted = Planted()
    uri = planted.within("http://127.0.0.1:9", "uri")
    raw = {"data": {"path": "x"}, "tracking": {"uri": uri}}
    wrong = [
        raw | {"tracking": {"uri": uri, "passwort": planted.secrets["PGPASSWORD"]}},
        raw | {"tracking": {"uri": [uri]}},
        raw | {"tracking": uri},
        raw | {"name": "a/b", "tracking": {"uri": uri, "experiment": 3}},
    ]
    for each in wrong:
        with pytest.raises(ConfigError) as refused:
            parse(RunConfig, each)
        assert planted.found_in(str(refused.value).encode()) == []
        assert planted.found_in(str(refused.value.__cause__).encode()) == []
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate(wrong[1])
    assert planted.found_in(str(refused.value).encode()) == []
    with pytest.raises(ConfigError) as refused:
        with_overrides(raw, [f"tracking.uri={uri}: ["])
    assert planted.found_in(str(refused.value).encode()) == []
    with pytest.raises(TrackingError) as refused:
        open_store(TrackingConfig(uri=uri), "runs")
    assert planted.found_in(str(refused.value).encode()) == []


# --------------------------------------------------------------------------------------------------- configs and places


@pytest.fixture
def config(tiny) -> RunConfig:
    return tiny(tracking={"uri": WITH_CREDENTIALS[0]})


def test_a_config_is_printed_and_written_without(config: RunConfig):
    tags = flatten(config.model_dump(mode="json"))
    for text in (repr(config), str(config), repr(config.tracking), dump(config), repr(written(config)), repr(tags)):
        assert PASSWORD not in text
        assert "host:5000/x" in text
    assert config.tracking.uri == WITH_CREDENTIALS[0]


def test_a_sweeps_config_is_written_without(config: RunConfig):
    raw = {"name": "a", "base": config.model_dump(mode="json"), "overrides": {"tracking.uri": WITH_CREDENTIALS[1]}}
    sweep = parse(SweepConfig, raw | {"space": {"mask.ratio": [0.5]}, "seeds": [0]})
    assert PASSWORD not in dump(sweep)
    assert PASSWORD not in repr(sweep)


def test_what_was_written_is_not_taken_for_the_uri(config: RunConfig):
    again = load_text(RunConfig, dump(config), "config.yaml")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD"):
        open_store(again.tracking, "runs")


def test_what_ray_shows_of_its_settings_is_without():
    hidden = Hidden(WITH_CREDENTIALS[0])
    assert PASSWORD not in str(_to_json_serializable_value({"tracking_uri": hidden, "deep": [hidden]}))
    assert PASSWORD not in f"{hidden} {hidden!r}"
    assert pickle.loads(pickle.dumps(hidden)).text == WITH_CREDENTIALS[0]
    assert PASSWORD not in repr(Store(WITH_CREDENTIALS[0], "1", "maskray"))


SHOWN_WHERE_IT_IS_MADE = {"maskray.launch.Summary"}
"""What it has of MLflow's URI is for the terminal, and has no password."""


def is_a_uri(field: str) -> bool:
    return field == "tracking" or field.endswith("uri")


def classes_with_a_uri() -> Iterator[str]:
    """Of plain data, by their source: whoever prints one, or an error that holds it, prints its fields."""
    package = Path(importlib.import_module("maskray.credentials").__file__ or "").parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "dataclass" in "".join(map(ast.unparse, node.decorator_list)):
                fields = [ast.unparse(each.target) for each in node.body if isinstance(each, ast.AnnAssign)]
                if any(map(is_a_uri, fields)):
                    room = ".".join(path.relative_to(package.parent).with_suffix("").parts)
                    yield f"{room}.{node.name}"


WITH_A_URI = sorted(set(classes_with_a_uri()) - SHOWN_WHERE_IT_IS_MADE)


def test_those_with_a_uri_are_found():
    assert {"maskray.on_ray.probe.Told", "maskray.tracking.mlflow_store.Store"} <= set(WITH_A_URI)


@pytest.mark.parametrize("name", WITH_A_URI)
def test_plain_data_with_a_uri_is_printed_without(name: str):
    room, _, kind = name.rpartition(".")
    made: Any = getattr(importlib.import_module(room), kind)
    texts: dict[str, Any] = {each.name: "x" for each in dataclasses.fields(made)}
    for each in (e for e in dataclasses.fields(made) if is_a_uri(e.name)):
        texts[each.name] = Hidden(WITH_CREDENTIALS[0]) if "Hidden" in str(each.type) else WITH_CREDENTIALS[0]
    assert PASSWORD not in repr(made(**texts))


@pytest.mark.parametrize("uri", [f"s3://AKIA:{PASSWORD}@bucket/x", f"s3://bucket/x?secret_key={PASSWORD}"])
def test_a_place_with_credentials_is_refused_and_not_repeated(uri: str):
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as refused:
        Storage(uri)
    assert PASSWORD not in str(refused.value)
    with pytest.raises(DataError, match="AWS_SECRET_ACCESS_KEY") as refused:
        open_source(uri)
    assert PASSWORD not in str(refused.value)


# --------------------------------------------------------------------------------------------- what tests are made with


def test_each_form_is_found():
    planted = Planted()
    for secret in planted.secrets.values():
        for how, form in forms(secret):
            assert planted.found_in(b"before " + form + b" after"), how
    assert planted.found_in(b"nothing") == []


def test_base64_is_found_wherever_it_begins():
    import base64

    planted = Planted()
    for before in (b"", b"a", b"ab", b"user:"):
        content = base64.b64encode(before + planted.secrets["PGPASSWORD"].encode() + b"rest")
        assert [hit for hit in planted.found_in(content) if hit.startswith("PGPASSWORD, base64")]

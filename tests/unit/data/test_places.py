"""Paths of a config, as workers in other folders must have them."""

from pathlib import Path

import pytest

from maskray.data.places import with_absolute_paths
from maskray.errors import ConfigError

WITH_KEYS = "s3://AKIAEXAMPLE:secret@bucket/x"


def test_relative_paths_are_those_of_this_folder(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(tiny(storage={"path": "runs"}, training={"ledger": "ledger"}))
    assert (config.storage.path, config.training.ledger) == (str(tmp_path / "runs"), str(tmp_path / "ledger"))
    assert config.init_from is None


@pytest.mark.parametrize("key", ["init_from", "data.path", "storage.path", "training.ledger"])
def test_credentials_are_refused_by_the_whole_name_of_their_key_and_not_repeated(tiny, key: str):
    section, _, name = key.rpartition(".")
    with pytest.raises(ConfigError, match=rf"^{key}: credentials do not belong into a config") as caught:
        with_absolute_paths(tiny(**({section: {name: WITH_KEYS}} if section else {name: WITH_KEYS})))
    assert "secret" not in str(caught.value)

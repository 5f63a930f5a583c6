"""The places that a config names, as every process of a run must find them."""

from __future__ import annotations

from typing import Any

from maskray import credentials
from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from maskray.errors import ConfigError


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """A config whose paths are absolute: workers run in other folders.

    Raises:
        ConfigError: one of them has credentials in it.
    """

    def moved(section: Any, name: str) -> Any:
        key = name.rpartition(".")[2]
        value = getattr(section, key)
        if value is not None and credentials.are_in(value):
            raise ConfigError(
                "credentials do not belong into a config, which is kept with the run",
                key=name,
                found=value,
                allowed="s3://bucket/prefix",
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead",
            )
        return section if value is None else section.model_copy(update={key: Storage(value).uri})

    config = moved(config, "init_from")
    return config.model_copy(
        update={
            "data": moved(moved(config.data, "data.path"), "data.cache_folder"),
            "storage": moved(config.storage, "storage.path"),
            "training": moved(config.training, "training.ledger"),
        }
    )

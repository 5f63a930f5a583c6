"""What Tune is told before a sweep."""

import pytest
from ray.tune import Trainable
from ray.tune.execution import class_cache

from maskray.on_ray.sweep.tune import keep_secrets


def test_keys_of_an_object_store_are_in_no_runtime_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", set(class_cache.ENV_VARS_TO_PROPAGATE))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_CHDIR_TO_TRIAL_DIR"):
        monkeypatch.setenv(name, "its value")

    def told() -> set[str]:
        environment = class_cache._ActorClassCache().get(Trainable)._default_options["runtime_env"]
        return environment["env_vars"].keys()

    assert "AWS_SECRET_ACCESS_KEY" in told(), "as Tune has it"
    keep_secrets()
    assert not [name for name in told() if name.startswith("AWS_")]
    assert "RAY_CHDIR_TO_TRIAL_DIR" in told()

"""All checks together: nothing stops them, and nothing is left behind."""

import time

import pytest

from maskray import cli
from maskray.config.load import dump
from maskray.doctor import environment
from maskray.doctor.examination import MODULES, examine, made
from maskray.doctor.finding import Check, Level, Subject
from maskray.errors import StorageError


def breaks(_):
    raise KeyError("a\nb")


def refuses(_):
    raise StorageError("no", key="storage.path", found="/x", fix="take another")


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_check_that_breaks_says_so():
    found = made(Check("broken", breaks), Subject())
    assert (found.level, found.found) == (Level.FAIL, "the check itself broke: KeyError: 'a\\nb'")


def test_a_check_that_hangs_says_so():
    start = time.monotonic()
    found = made(Check("hung", lambda _: time.sleep(5), limit_seconds=0.1), Subject())
    assert (found.level, found.found) == (Level.FAIL, "no answer within 0.1 s")
    assert time.monotonic() - start < 3


def test_a_refusal_is_a_finding_with_its_fix():
    found = made(Check("storage", refuses), Subject())
    assert (found.level, found.found, found.fix) == (Level.FAIL, "storage.path: no. Found: /x", "take another")


def test_a_module_that_cannot_be_imported_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(environment, "CHECKS", [Check("first", lambda _: None)])
    found = dict(examine(Subject(), ["nowhere", "environment"]))
    assert found["nowhere"].level is Level.FAIL
    assert "No module named 'maskray.doctor.nowhere'" in found["nowhere"].found
    assert found["first"] is None


def test_a_right_config_passes_and_nothing_is_left_behind(tiny, tmp_path, capsys, monkeypatch):
    config = tiny()
    path = tmp_path / "run.yaml"
    path.write_text(dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    before = tree(tmp_path)
    code = cli.main(["doctor", "--config", str(path)])
    said = capsys.readouterr().out
    assert code == 0, said
    assert tree(tmp_path) == before
    assert not (tmp_path / "runs").exists()
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("ok       dataset")]
    assert [line for line in lines if line.startswith("ok       loss at step 0")]
    assert "0 failed" in lines[-1]


def test_a_wrong_config_fails_and_the_rest_is_looked_at(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\ndata: {path: nowhere}\noptim: {epochs: 1}\ntypo: 1\n")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["doctor", "--config", str(path)]) == 1
    said = capsys.readouterr().out
    assert "FAIL     config              typo" in said
    assert "mend the config first" in said
    assert "ok       draws" in said
    assert max(map(len, said.splitlines())) <= 80


def test_names_of_checks_are_told_apart():
    names = [name for name, _ in examine(Subject(), [m for m in MODULES if m != "numerics"])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", MODULES)
def test_every_check_has_a_docstring_that_says_what_it_asks(module):
    checks = __import__(f"maskray.doctor.{module}", fromlist=["CHECKS"]).CHECKS
    assert [check.name for check in checks if not check.look.__doc__] == []

"""Names in files that others may have written: none leads out of the folder that it belongs to."""

import dataclasses
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from maskray.config.load import parse
from maskray.config.schema import IngestConfig, RunConfig
from maskray.data.manifest import MANIFEST, Manifest, Shard, Split
from maskray.data.shards import Dataset
from maskray.data.sources import open_source
from maskray.data.storage import Storage, leads_out
from maskray.errors import ConfigError, DataError, MaskrayError, StorageError

OUTSIDE = ["../x", "a/../../x", "..", "/etc/x", "a/..", "x\0y", "\0"]
OF_WINDOWS = [r"..\x", r"a\..\..\x", r"C:\x", "C:x", r"\x", "c:/x", "a:b"]
INSIDE = ["x", "a/x", "a..b/..c", "...", "a/.x", "train/00000.parquet", "ä/é", "a b", "~x", "12:x"]


@pytest.mark.parametrize("name", [*OUTSIDE, *OF_WINDOWS])
def test_names_that_lead_out(name: str):
    assert leads_out(name)


@pytest.mark.parametrize("name", INSIDE)
def test_names_that_do_not(name: str):
    assert not leads_out(name)


# ------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_of_a_place_is_read_or_changed(place: str, name: str):
    storage = Storage(place).child("inside")
    storage.write_bytes("x", b"mine")
    Storage(place).write_bytes("x", b"theirs")
    for call in (
        lambda: storage.read_bytes(name),
        lambda: storage.read_range(name, 0, 1),
        lambda: list(storage.read_pieces(name)),
        lambda: storage.open_input_file(name),
        lambda: storage.exists(name),
        lambda: storage.list_names(name),
        lambda: storage.write_bytes(name, b"changed"),
        lambda: storage.create_exclusive(name, b"changed"),
        lambda: storage.delete(name),
    ):
        with pytest.raises(StorageError, match="leads out of its place"):
            call()
    assert Storage(place).read_bytes("x") == b"theirs"
    assert storage.read_bytes("x") == b"mine"


def test_a_link_is_deleted_and_not_what_it_leads_to(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "step_1").symlink_to(tmp_path / "precious")
    Storage(tmp_path / "runs").delete("step_1")
    assert not (tmp_path / "runs" / "step_1").is_symlink()
    assert (tmp_path / "precious" / "file").read_text() == "x"


# ----------------------------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize("name", [*OUTSIDE, *OF_WINDOWS])
def test_a_manifest_that_names_a_shard_outside_is_refused(digits: Path, tmp_path: Path, name: str):
    """Its fingerprint is right: who changes a manifest can do that sum."""
    manifest = Manifest.load((digits / MANIFEST).read_bytes(), str(digits))
    first, *rest = manifest.splits["train"].shards
    hostile = Shard(name, first.rows, first.size, first.sha256)
    splits = manifest.splits | {"train": Split((hostile, *rest), manifest.splits["train"].pixels)}
    (tmp_path / MANIFEST).write_bytes(dataclasses.replace(manifest, splits=splits, fingerprint="").dump())
    with pytest.raises(DataError, match="names a shard that is not in it") as refused:
        Dataset.open(str(tmp_path))
    assert refused.value.key == "data.path"
    assert repr(name)[1:-1] in repr(str(refused.value))


def test_each_shard_of_ours_is_inside(digits: Path):
    assert [shard.name for shard in Dataset.open(str(digits)).manifest.shards if leads_out(shard.name)] == []


# ------------------------------------------------------------------------------------------------------------- sources


def _tar(path: Path, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("in/good.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"png"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, 3 if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(b"bad"))
    return path


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", r"..\x.png", r"C:\x.png", "c:x.png"])
def test_archives_with_names_that_lead_out_are_refused(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"bad")
    for place in (_tar(tmp_path / "a.tar", name), tmp_path / "a.zip"):
        with pytest.raises(DataError, match="leads out of it") as refused:
            open_source(str(place))
        assert name in str(refused.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("link", ["/etc/passwd", "../../../../etc/passwd", "in/good.png"])
def test_links_in_an_archive_lead_nowhere(tmp_path: Path, kind: bytes, link: str):
    source = open_source(str(_tar(tmp_path / "a.tar", "in/link.png", kind, link)))
    (entry,) = [entry for entry in source.entries if entry.key == "in/link.png"]
    with pytest.raises(OSError, match="has no bytes of its own"):
        source.read(entry)


def test_nothing_is_written_by_reading_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source = open_source(str(_tar(tmp_path / "a.tar", "in/b.png")))
    assert sorted(source.read(entry) for entry in source.entries) == [b"bad", b"png"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "here"]


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd"])
def test_a_table_in_a_bucket_names_no_file_of_this_machine(bucket: str, path: str):
    Storage(bucket).write_bytes("table.csv", f"path\n{path}\n".encode())
    with pytest.raises(DataError, match="names a file of this machine") as refused:
        open_source(f"{bucket}/table.csv")
    assert path in str(refused.value)


@pytest.mark.parametrize("path", ["ftp://host/x.png", "http://169.254.169.254/latest/x.png", "gopher://x/y.png"])
def test_a_table_does_not_make_requests(tmp_path: Path, path: str):
    (tmp_path / "table.csv").write_text(f"path\n{path}\n")
    with pytest.raises(DataError, match="this kind of address"):
        open_source(str(tmp_path / "table.csv"))


# ------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", r"a\b", "x\0y", ""])
def test_the_name_of_a_run_is_no_path(name: str):
    with pytest.raises(ConfigError):
        parse(RunConfig, {"name": name, "data": {"path": "x"}})


def test_a_version_is_no_path(digits: Path):
    with pytest.raises(MaskrayError):
        Dataset.open(str(digits), "../../manifest")


def test_ingest_writes_below_its_destination_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from maskray.data.ingest import ingest
    from maskray.data.mapper import thread_mapper

    monkeypatch.chdir(tmp_path)
    config = IngestConfig(source="digits", destination=str(tmp_path / "out"), group_rows=16)
    ingest(config, thread_mapper(1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / MANIFEST).read_bytes())["splits"]

"""Tars and zips: members at random, labels as WebDataset has them, nothing that leads out of them."""

import io
import logging
import pickle
import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from maskray.data.shards import Dataset
from maskray.data.sources import open_source
from maskray.errors import DataError


def make_tar(path, members, mode="w", **options):
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


MAKERS = {
    ".tar": make_tar,
    ".zip": make_zip,
    ".deflated.zip": lambda path, members: make_zip(path, members, zipfile.ZIP_DEFLATED),
}


@pytest.fixture
def images(picture, encoded):
    return {f"{('cats', 'dogs')[i % 2]}/{i}.png": encoded(picture(i)) for i in range(8)}


def contents(source):
    return {entry.key: source.read(entry) for entry in source.entries}


@pytest.mark.parametrize("suffix", MAKERS)
def test_members_are_read_at_random_from_any_thread(tmp_path, images, suffix):
    MAKERS[suffix](tmp_path / f"a{suffix}", images | {"notes.txt": b"x", "cats/.hidden.png": b"x"})
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / f"a{suffix}"))))
    assert len(pickle.dumps(source.read)) < 500
    assert [e.key for e in source.entries] == list(images), "in the order in which they lie"
    assert source.class_names == ("cats", "dogs")
    entries = random.Random(0).sample(source.entries * 5, 40)
    with ThreadPoolExecutor(4) as pool:
        for entry, data in zip(entries, pool.map(source.read, entries), strict=True):
            assert data == images[entry.key]
            assert source.class_names[entry.label] == entry.key.split("/")[0]


@pytest.mark.parametrize("suffix", MAKERS)
def test_of_many_archives_each_is_a_folder(tmp_path, images, suffix):
    (tmp_path / "in").mkdir()
    MAKERS[suffix](tmp_path / f"in/a{suffix}", images)
    MAKERS[suffix](tmp_path / f"in/b{suffix}", images)
    expected = {f"{archive}{suffix}/{name}": data for archive in "ab" for name, data in images.items()}
    for text in ("in", f"in/*{suffix[-4:]}"):
        source = open_source(str(tmp_path / text))
        assert contents(source) == expected
        assert source.class_names == ("cats", "dogs")


@pytest.mark.parametrize("suffix", MAKERS)
def test_webdataset_labels(tmp_path, images, suffix):
    samples = {}
    for i, data in enumerate(images.values()):
        label = {"cls": str(i % 3).encode()} if i % 2 else {"json": b'{"label": %d, "text": "x"}' % (i % 3)}
        samples |= {f"s/{i:03d}.JPG": data} | {f"s/{i:03d}.{kind}": value for kind, value in label.items()}
    samples["s/001.seg.png"] = b"another image of the sample 001"
    MAKERS[suffix](tmp_path / f"a{suffix}", samples)
    source = open_source(str(tmp_path / f"a{suffix}"))
    assert source.class_names == ("0", "1", "2")
    labels = {e.key: e.label for e in source.entries}
    assert labels == {f"s/{i:03d}.JPG": i % 3 for i in range(8)} | {"s/001.seg.png": 1}


def test_labels_may_be_names_and_then_are_numbered(tmp_path, images):
    named = zip(images.values(), ["owl", '{"cls": "ape"}', "owl"], strict=False)
    samples = {}
    for i, (data, label) in enumerate(named):
        samples |= {f"{i}.png": data, f"{i}.{'json' if '{' in label else 'cls'}": label.encode()}
    source = open_source(str(make_tar(tmp_path / "a.tar", samples)))
    assert source.class_names == ("ape", "owl")
    assert [e.label for e in source.entries] == [1, 0, 1]


@pytest.mark.parametrize(
    "content", [b"", b"-1", b"{", b"[1]", b'{"label": null}', b'{"other": 1}', b"\xff\xfe", b"[" * 100_000]
)
def test_labels_of_some_are_left_out_and_said(tmp_path, images, content, caplog):
    one, two = list(images.values())[:2]
    kind = "cls" if content in (b"", b"-1") else "json"
    source = open_source(
        str(make_tar(tmp_path / "a.tar", {"1.png": one, "1.cls": b"1", "2.png": two, f"2.{kind}": content}))
    )
    assert [e.label for e in source.entries] == [None, None]
    assert source.class_names == ()
    assert "1 of 2 images have no label" in caplog.text


def test_one_folder_around_all_is_no_class(tmp_path, images, caplog):
    around = {f"./data/train/{name}": data for name, data in images.items()}
    with caplog.at_level(logging.WARNING):
        source = open_source(str(make_tar(tmp_path / "a.tar", around)))
    assert source.class_names == ("cats", "dogs")
    assert [e.key for e in source.entries] == [f"data/train/{name}" for name in images]
    flat = {name.partition("/")[2]: data for name, data in images.items()}
    for prefix in ("", "data/", "./data/train/"):
        members = {prefix + name: data for name, data in flat.items()}
        assert open_source(str(make_tar(tmp_path / "b.tar", members))).class_names == ()
    assert caplog.text == ""


@pytest.mark.parametrize("suffix", MAKERS)
def test_a_folder_named_by_a_dot_is_none_and_hides_nothing(tmp_path, images, suffix):
    one, two = list(images.values())[:2]
    MAKERS[suffix](tmp_path / f"a{suffix}", {"k/a.png": one, "k/./b.png": two, "k/.c/d.png": one, ".//e.png": one})
    assert [e.key for e in open_source(str(tmp_path / f"a{suffix}")).entries] == ["k/a.png", "k/b.png", "e.png"]


@pytest.mark.parametrize("suffix", MAKERS)
def test_members_that_are_no_images_by_their_names_are_counted(tmp_path, images, suffix, caplog):
    texts = {f"{i}.txt": b"a cat" for i in range(3)} | {"c": b"x", "0.cls": b"1", ".hidden": b"x"}
    MAKERS[suffix](tmp_path / f"a{suffix}", images | texts)
    assert len(open_source(str(tmp_path / f"a{suffix}")).entries) == len(images)
    (said,) = (m for m in caplog.messages if "left out for" in m)
    assert said.endswith(
        f"a{suffix}: 4 files are left out for their suffixes, which are not those of images: 3 .txt, 1 without one"
    )


@pytest.mark.parametrize("suffix", MAKERS)
@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", r"..\x.png", r"C:\x.png", r"\x.png"])
def test_names_that_lead_out_are_refused_by_name(tmp_path, images, suffix, name):
    MAKERS[suffix](tmp_path / f"a{suffix}", images | {name: b"x"})
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / f"a{suffix}"))
    assert f"Found: {name}" in str(caught.value)
    assert "leads out of it" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("suffix", MAKERS)
@pytest.mark.parametrize("second", ["cats/0.png", "./cats/0.png"])
def test_two_of_one_key_are_refused_by_name(tmp_path, images, suffix, second):
    path = tmp_path / f"a{suffix}"
    if suffix == ".tar":
        make_tar(path, images)
        make_tar(path, {second: b"x"}, "a")
    else:
        make_zip(path, images)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(second, b"x")
    with pytest.raises(DataError, match=r"two images have the same key. Found: cats/0.png \(in a.* at \d+ and in"):
        open_source(str(path))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path, images, mode):
    for name in (f"a.tar.{mode[2:]}", "hidden.tar"):
        make_tar(tmp_path / name, images, mode)
        with pytest.raises(DataError, match=r"compressed tar cannot be read at random.*unpack it"):
            open_source(str(tmp_path / name))


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize("suffix", MAKERS)
def test_an_archive_cut_short_is_refused_by_name(tmp_path, images, suffix, share):
    path = tmp_path / f"a{suffix}"
    MAKERS[suffix](path, images)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=rf"the archive .*a{suffix} cannot be read"):
        open_source(str(path))


def test_a_tar_without_an_end_is_read_and_said(tmp_path, images, caplog):
    path = make_tar(tmp_path / "a.tar", images)
    data = path.read_bytes()
    path.write_bytes(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512))
    assert contents(open_source(str(path))) == images
    assert "a.tar has no mark of its end" in caplog.text


def test_a_tar_with_a_broken_header_in_the_middle_is_refused(tmp_path, images):
    path = make_tar(tmp_path / "a.tar", images)
    data = bytearray(path.read_bytes())
    data[data.index(b"dogs/3.png")] ^= 1  # the header's checksum no longer fits
    path.write_bytes(data)
    with pytest.raises(DataError, match="there is no header at byte"):
        open_source(str(path))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_each_form_of_tar(tmp_path, images, form):
    long = f"{'x' * 90}/{'y' * 90}.png" if form == tarfile.USTAR_FORMAT else f"{'x' * 3000}.png"
    samples = dict.fromkeys([long, "猫/é.png"], next(iter(images.values())))
    source = open_source(str(make_tar(tmp_path / "a.tar", samples, format=form)))
    assert contents(source) == samples


def test_a_name_in_a_tar_that_is_not_utf8_is_escaped(tmp_path, images, ingest_here):
    path = tmp_path / "a.tar"
    make_tar(path, images | {"café.png": images["cats/0.png"]}, format=tarfile.GNU_FORMAT, encoding="latin-1")
    key = r"caf\xe9.png"
    assert contents(open_source(str(path))) == images | {key: images["cats/0.png"]}
    ingest_here(path, tmp_path / "shards", held_out_fraction=0)
    assert key in {k for group in Dataset.open(str(tmp_path / "shards")).iter_groups() for k in group.keys}
    make_tar(path, {"../é.png": b"x"}, format=tarfile.GNU_FORMAT, encoding="latin-1")
    with pytest.raises(DataError, match=r"leads out of it. Found: \.\./\\xe9\.png"):
        open_source(str(path))


def test_links_and_devices_in_a_tar_are_listed_and_not_followed(tmp_path, images):
    path = make_tar(tmp_path / "a.tar", images)
    kinds = {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
    with tarfile.open(path, "a") as tar:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("folder.png").replace(deep=True))
    source = open_source(str(path))
    listed = {e.key: e for e in source.entries}
    assert set(listed) == set(images) | {f"{name}.png" for name in kinds} | {"folder.png"}
    for name in kinds:
        with pytest.raises(OSError, match="no bytes of its own"):
            source.read(listed[f"{name}.png"])


def test_a_damaged_member_of_a_zip_is_its_own_matter(tmp_path, images):
    for method, reason in ((zipfile.ZIP_STORED, "checksum"), (zipfile.ZIP_DEFLATED, "checksum|decompressed|cut short")):
        path = make_zip(tmp_path / "a.zip", images, method)
        data = bytearray(path.read_bytes())
        at = data.index(b"cats/0.png") + 60
        data[at : at + 8] = bytes(255 - b for b in data[at : at + 8])
        path.write_bytes(data)
        source = open_source(str(path))
        with pytest.raises(OSError, match=reason):
            source.read(source.entries[0])
        assert source.read(source.entries[1]) == images["dogs/1.png"]


def test_zips_that_cannot_be_read_say_why(tmp_path, images):
    path = make_zip(tmp_path / "a.zip", images, zipfile.ZIP_LZMA)
    source = open_source(str(path))
    with pytest.raises(OSError, match="compression method 14 is not known"):
        source.read(source.entries[0])
    data = bytearray(make_zip(path, images).read_bytes())
    data[6] |= 1
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(OSError, match="encrypted"):
        source.read(source.entries[0])


def test_a_zip_bomb_is_not_blown_up(tmp_path, monkeypatch):
    monkeypatch.setattr("maskray.data.sources.archives.MAX_IMAGE_BYTES", 2**20)
    source = open_source(str(make_zip(tmp_path / "a.zip", {"a.png": bytes(2**22)}, zipfile.ZIP_DEFLATED)))
    with pytest.raises(OSError, match="larger than 1048576 bytes"):
        source.read(source.entries[0])


class Pipe(io.RawIOBase):
    """What cannot be gone back in."""

    def __init__(self, target):
        self.target = target

    def writable(self):
        return True

    def write(self, data):
        return self.target.write(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_written_as_a_stream_has_its_sizes_and_checksums_behind_the_data(tmp_path, images, method):
    path = tmp_path / "a.zip"
    with path.open("wb") as target, zipfile.ZipFile(Pipe(target), "w", method) as archive:
        for name, content in images.items():
            archive.writestr(name, content)
    assert contents(open_source(str(path))) == images
    data = bytearray(path.read_bytes())
    data[data.index(b"dogs/1.png") + 100] ^= 8
    path.write_bytes(data)
    source = open_source(str(path))
    damaged = next(e for e in source.entries if e.key == "dogs/1.png")
    with pytest.raises(OSError, match=r"its checksum is wrong|cannot be decompressed|cut short"):
        source.read(damaged)


def test_a_long_name_in_a_zip(tmp_path, images):
    samples = {f"{'x' * 60_000}/{name}": data for name, data in images.items()}
    assert contents(open_source(str(make_zip(tmp_path / "a.zip", samples)))) == samples


def test_archives_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="there are no images in it"):
        open_source(str(make_tar(tmp_path / "a.tar", {"a.txt": b"x"})))


def test_the_stamp_of_an_archive_moves_with_it(tmp_path, images):
    path = make_tar(tmp_path / "a.tar", images)
    before = open_source(str(path)).stamp
    assert open_source(str(path)).stamp == before
    make_tar(path, {"new.png": b"x"}, "a")
    assert open_source(str(path)).stamp != before

import argparse
import hashlib
import logging

import pytest
import torch
from safetensors.torch import save_file

from maskray.config.models import VitConfig, VitDecoder
from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.models.build import build_model
from maskray.models.foreign import WEIGHTS_FILE, load_weights, weights_digest
from maskray.models.vit import position_table

CONFIG = VitConfig(patch=4, width=32, depth=2, heads=4, decoder=VitDecoder(width=16, depth=1, heads=2))


def build(seed=0, size=(16, 16), channels=3):
    torch.manual_seed(seed)
    return build_model(CONFIG, size, channels)


def encoder_only(weights):
    return {k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token"))}


@pytest.fixture
def source():
    return build(seed=1).state_dict()


@pytest.mark.parametrize("form", ["weights.safetensors", "weights.pth", "published.pth", "training.pth", "folder"])
def test_every_form_of_a_file_loads_to_the_bit(form, source, tmp_path):
    path = tmp_path / form
    match form:
        case "weights.safetensors":
            save_file(source, path)
        case "weights.pth":
            torch.save(source, path)
        case "published.pth":
            torch.save({"model": source}, path)
        case "training.pth":  # as the authors' training script writes it
            torch.save({"model": source, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, path)
        case "folder":
            path.mkdir()
            save_file(source, path / "model.safetensors")
    model = build(seed=2)
    assert load_weights(model, path) == ()
    assert all(torch.equal(model.state_dict()[name], source[name]) for name in source)


def test_an_encoder_alone_leaves_the_decoder_fresh_and_says_so(source, tmp_path, caplog):
    save_file(encoder_only(source), tmp_path / "encoder.safetensors")
    model, before = build(seed=2), build(seed=2).state_dict()
    with caplog.at_level(logging.INFO):
        fresh = load_weights(model, tmp_path / "encoder.safetensors")
    assert "encoder alone" in caplog.text
    after = model.state_dict()
    assert set(after) - set(fresh) == set(encoder_only(source))
    assert all(torch.equal(after[name], before[name] if name in fresh else source[name]) for name in after)


@pytest.mark.parametrize("size", [(32, 32), (8, 24), (8, 32)])
def test_positions_of_another_grid_are_resampled_in_two_dimensions(size, source, tmp_path, caplog):
    save_file(source, tmp_path / "weights.safetensors")
    model = build(seed=2, size=size)
    with caplog.at_level(logging.INFO):
        load_weights(model, tmp_path / "weights.safetensors")
    rows, columns = model.grid_HW
    got = model.pos_embed[0, 1:].reshape(rows, columns, -1)
    if rows * columns == 16:
        assert "resampled" not in caplog.text
        return
    assert "pos_embed resampled from 4 × 4" in caplog.text
    torch.testing.assert_close(got[0, :, :16], got[-1, :, :16], atol=1e-5, rtol=0)  # the half that says the column
    torch.testing.assert_close(got[:, 0, 16:], got[:, -1, 16:], atol=1e-5, rtol=0)  # the half that says the row
    assert (got[0, 0] != got[-1, -1]).any()


def test_positions_of_the_same_oblong_grid_are_left_alone(tmp_path):
    source = build(seed=1, size=(8, 32)).state_dict()
    save_file(source, tmp_path / "weights.safetensors")
    model = build(seed=2, size=(8, 32))
    load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.pos_embed, position_table(32, (2, 8)))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "step_000000004-a"])
def test_any_place_is_read_as_a_local_path_is(source, place, tmp_path, name):
    """A bucket too; the name of a file, or of a checkpoint's folder."""
    local = tmp_path / ("weights.pth" if name.endswith(".pth") else "weights.safetensors")
    (torch.save if name.endswith(".pth") else save_file)(source, local)
    storage = Storage(f"{place}/elsewhere")
    storage.write_bytes(name if "." in name else f"{name}/{WEIGHTS_FILE}", local.read_bytes())
    model = build(seed=2)
    load_weights(model, storage.join(name))
    assert torch.equal(model.pos_embed, source["pos_embed"])
    assert weights_digest(storage.join(name)) == hashlib.sha256(local.read_bytes()).hexdigest()


def test_a_folder_of_weights_may_have_a_question_mark_in_its_name(tmp_path):
    (tmp_path / "a?b").mkdir()
    (tmp_path / "a?b/weights.safetensors").write_bytes(b"x")
    assert weights_digest(tmp_path / "a?b/weights.safetensors") == hashlib.sha256(b"x").hexdigest()


def test_weights_that_are_nowhere_are_named(place):
    path = f"{place}/gone.pth"
    for read in (weights_digest, lambda p: load_weights(build(), p)):
        with pytest.raises(
            CheckpointError, match=r"init_from: .*cannot be read.*gone\.pth.*What to do: check the path"
        ):
            read(path)


def refused(weights, tmp_path, match, model=None):
    save_file(weights, tmp_path / "weights.safetensors")
    model = model or build(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_weights(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_missing_names_are_named(source, tmp_path):
    del source["blocks.1.attn.qkv.weight"]
    refused(source, tmp_path, r"init_from.*missing blocks\.1\.attn\.qkv\.weight")


def test_half_a_decoder_is_no_encoder_alone(source, tmp_path):
    del source["decoder_pred.bias"]
    refused(source, tmp_path, r"missing decoder_pred\.bias")


def test_unexpected_names_are_named_and_long_lists_cut(source, tmp_path):
    source |= {f"head.{i}": torch.zeros(1) for i in range(9)}
    refused(source, tmp_path, r"unexpected head\.0.*and 3 more")


def test_another_size_is_named_with_both_shapes(source, tmp_path):
    source["patch_embed.proj.weight"] = torch.zeros(32, 1, 4, 4)
    refused(source, tmp_path, r"patch_embed\.proj\.weight \(32, 1, 4, 4\) where the model has \(32, 3, 4, 4\)")


def test_an_oblong_grid_that_cannot_be_told_is_refused(tmp_path):
    source = build(seed=1, size=(8, 24)).state_dict()
    refused(source, tmp_path, r"pos_embed \(1, 13, 32\) where the model has \(1, 17, 32\)")


class Stranger:
    """Something that unpickling would have to run code for."""


@pytest.mark.parametrize("content", ["nothing", "not weights", "code", "number", "suffix"])
def test_what_holds_no_weights_is_refused(content, tmp_path):
    path = tmp_path / "weights.pth"
    match content:
        case "not weights":
            path.write_bytes(b"hello")
        case "code":
            torch.save({"model": Stranger()}, path)
        case "number":
            torch.save({"model": {"step": 3}}, path)
        case "suffix":
            path = tmp_path / "weights.bin"
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="init_from"):
        load_weights(build(), path)


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(CheckpointError, match="init_from"):
        load_weights(build(), tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(build(), tmp_path / "weights.safetensors")

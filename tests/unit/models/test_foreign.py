import argparse
import hashlib
import json
import logging

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from maskray.config.models import TimmVitConfig, VitConfig, VitDecoder
from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.models import parameter_names as names
from maskray.models.build import build_model
from maskray.models.foreign import WEIGHTS_FILE, load_weights, save_weights, weights_digest
from maskray.models.vit import position_table

CONFIG = VitConfig(patch=4, width=32, depth=2, heads=4, decoder=VitDecoder(width=16, depth=1, heads=2))


def build(seed=0, size=(16, 16), channels=3, positions="fixed"):
    torch.manual_seed(seed)
    return build_model(CONFIG.model_copy(update={"positions": positions}), size, channels)


def encoder_only(weights):
    return {k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token"))}


@pytest.fixture
def source():
    return build(seed=1).state_dict()


@pytest.mark.parametrize(
    "form", ["weights.safetensors", "weights.pth", "weights.bin", "published.pth", "training.pth", "timm.pth", "folder"]
)
def test_every_form_of_a_file_loads_to_the_bit(form, source, tmp_path):
    path = tmp_path / form
    match form:
        case "weights.safetensors":
            save_file(source, path)
        case "weights.pth" | "weights.bin":
            torch.save(source, path)
        case "published.pth":
            torch.save({"model": source}, path)
        case "training.pth":  # as the authors' training script writes it
            torch.save({"model": source, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, path)
        case "timm.pth":  # as timm's writes it
            torch.save({"epoch": 3, "arch": "vit", "state_dict": source, "args": argparse.Namespace(lr=1e-3)}, path)
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
    assert "pos_embed resampled from 4 × 4" in caplog.text
    torch.testing.assert_close(got[0, :, :16], got[-1, :, :16], atol=1e-5, rtol=0)  # the half that says the column
    torch.testing.assert_close(got[:, 0, 16:], got[:, -1, 16:], atol=1e-5, rtol=0)  # the half that says the row
    assert (got[0, 0] != got[-1, -1]).any()


@pytest.mark.parametrize("positions", ["fixed", "learnable"])
@pytest.mark.parametrize(("source_px", "target_px"), [((8, 32), (16, 16)), ((8, 32), (32, 8)), ((8, 32), (32, 32))])
def test_an_oblong_grid_is_known_by_its_table_or_by_the_config_beside_it(
    positions, source_px, target_px, tmp_path, caplog
):
    """As many cells in another shape, too: each position comes from its own place of the picture."""
    save_file(build(seed=1, size=source_px, positions=positions).state_dict(), tmp_path / "model.safetensors")
    if positions == "learnable":
        run = {
            "name": "x",
            "data": {"path": "x", "image_size": list(source_px)},
            "model": {"patch": 4},
            "optim": {"steps": 1},
        }
        (tmp_path / "config.yaml").write_text(json.dumps(run))
    model = build(seed=2, size=target_px, positions=positions)
    with caplog.at_level(logging.INFO):
        load_weights(model, tmp_path / "model.safetensors")
    assert "pos_embed resampled from 2 × 8" in caplog.text
    expected = resample_abs_pos_embed(position_table(32, (2, 8)), list(model.grid_HW), [2, 8], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed, expected, atol=1e-5, rtol=0)


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
    source["pos_embed"] = torch.randn(1, 13, 32)  # learned ones are no table that could be recognised
    refused(source, tmp_path, r"pos_embed \(1, 13, 32\) where the model has \(1, 17, 32\)")
    source["pos_embed"] = torch.zeros(1, 1, 32)
    refused(source, tmp_path, r"pos_embed \(1, 1, 32\) where the model has \(1, 17, 32\)")


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
            path = tmp_path / "weights.ckpt"
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


# ------------------------------------------------------------------------------------------------------- others' names

# What ViTMAEForPreTraining's checkpoints hold for CONFIG, 16 pixels and 3 channels: from transformers' documentation of
# the model, and as its published ones are.
HF_ENDS = {
    "vit.embeddings.cls_token": (1, 1, 32),
    "vit.embeddings.position_embeddings": (1, 17, 32),
    "vit.embeddings.patch_embeddings.projection.weight": (32, 3, 4, 4),
    "vit.embeddings.patch_embeddings.projection.bias": (32,),
    "vit.layernorm.weight": (32,),
    "vit.layernorm.bias": (32,),
    "decoder.mask_token": (1, 1, 16),
    "decoder.decoder_pos_embed": (1, 17, 16),
    "decoder.decoder_embed.weight": (16, 32),
    "decoder.decoder_embed.bias": (16,),
    "decoder.decoder_norm.weight": (16,),
    "decoder.decoder_norm.bias": (16,),
    "decoder.decoder_pred.weight": (48, 16),
    "decoder.decoder_pred.bias": (48,),
}
HF_LAYER = {  # rows and columns, in widths
    "attention.attention.query": (1, 1),
    "attention.attention.key": (1, 1),
    "attention.attention.value": (1, 1),
    "attention.output.dense": (1, 1),
    "intermediate.dense": (4, 1),
    "output.dense": (1, 4),
    "layernorm_before": (1,),
    "layernorm_after": (1,),
}


def hf_shapes():
    shapes = dict(HF_ENDS)
    for layer, width in (("vit.encoder.layer.0", 32), ("vit.encoder.layer.1", 32), ("decoder.decoder_layers.0", 16)):
        for name, of_width in HF_LAYER.items():
            shapes[f"{layer}.{name}.weight"] = tuple(n * width for n in of_width)
            shapes[f"{layer}.{name}.bias"] = (of_width[0] * width,)
    return shapes


def saved(weights, path, kind):
    save_weights(weights, path, kind)
    return torch.load(path, weights_only=True)["model"] if path.suffix == ".pth" else load_file(path)


def test_hugging_faces_names_and_shapes_are_those_of_its_documentation(source, tmp_path):
    theirs = saved(source, tmp_path / "weights.safetensors", "hf")
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == hf_shapes()
    qkv = source["blocks.1.attn.qkv.weight"]
    for i, part in enumerate(("query", "key", "value")):
        of_part = theirs[f"vit.encoder.layer.1.attention.attention.{part}.weight"]
        assert torch.equal(of_part, qkv[32 * i : 32 * (i + 1)])


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch"), [(768, 12, 12, 16), (1024, 24, 16, 16), (1280, 32, 16, 14)]
)
def test_each_parameter_of_the_authors_sizes_has_one_name_at_hugging_face(width, depth, heads, patch):
    with torch.device("meta"):
        model = build_model(VitConfig(width=width, depth=depth, heads=heads, patch=patch), (224, 224), 3)
    ours = model.state_dict()
    theirs = [part for name in ours for part in names.theirs("hf", name)]
    assert all(part.startswith(("vit.", "decoder.")) for part in theirs)
    assert len(set(theirs)) == len(theirs) == len(ours) + 2 * 2 * (depth + 8)  # q, k and v: weights and biases


@pytest.mark.parametrize(
    ("kind", "file", "says"),
    [
        ("mae", "weights.pth", "the MAE authors' names"),
        ("mae", "weights.safetensors", "the MAE authors' names"),
        ("hf", "weights.safetensors", "Hugging Face ViTMAE's names"),
        ("timm", "weights.safetensors", "timm's names"),
    ],
)
def test_there_and_back_is_equal_to_the_bit_and_the_log_says_whose_names(kind, file, says, source, tmp_path, caplog):
    kept = encoder_only(source) if kind == "timm" else source
    theirs = saved(kept, tmp_path / file, kind)
    model = build(seed=2)
    with caplog.at_level(logging.INFO):
        fresh = load_weights(model, tmp_path / file)
    assert f"has {says}" in caplog.text
    assert set(fresh) == set(source) - set(kept)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    again = saved({name: t for name, t in model.state_dict().items() if name in kept}, tmp_path / f"again-{file}", kind)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())


def newer(name):
    """What a parameter is called in transformers 5."""
    renamed = {
        "vit.encoder.layer.": "vit.layers.",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        **{f"attention.attention.{part}": f"attention.{part[0]}_proj" for part in ("query", "key", "value")},
    }
    for old, new in renamed.items():
        name = name.replace(old, new)
    return name


SPELLINGS = {
    "modules of transformers 5": newer,
    "files of transformers 5": lambda name: name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_hugging_faces_other_spellings_are_read_too(spelling, source, tmp_path):
    theirs = saved(source, tmp_path / "weights.safetensors", "hf")
    respelled = {SPELLINGS[spelling](name): tensor for name, tensor in theirs.items()}
    assert respelled.keys() != theirs.keys()
    torch.save(respelled, tmp_path / "pytorch_model.bin")
    model = build(seed=2)
    assert load_weights(model, tmp_path / "pytorch_model.bin") == ()
    assert all(torch.equal(model.state_dict()[name], source[name]) for name in source)


def test_hugging_faces_base_model_is_an_encoder_alone(source, tmp_path):
    theirs = saved(encoder_only(source), tmp_path / "weights.safetensors", "hf")
    save_file({name.removeprefix("vit."): tensor for name, tensor in theirs.items()}, tmp_path / "base.safetensors")
    model = build(seed=2)
    assert set(load_weights(model, tmp_path / "base.safetensors")) == set(source) - set(encoder_only(source))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in encoder_only(source).items())


def test_what_a_foreign_file_lacks_or_has_too_much_is_named_in_its_own_words(source, tmp_path):
    theirs = saved(source, tmp_path / "weights.safetensors", "hf")
    gone = "vit.encoder.layer.1.attention.attention.key.weight"
    del theirs[gone]
    refused(theirs | {"classifier.weight": torch.zeros(2)}, tmp_path, f"missing {gone}; unexpected classifier.weight")


def test_a_foreign_tensor_of_another_size_is_named(source, tmp_path):
    theirs = saved(source, tmp_path / "weights.safetensors", "hf")
    theirs["vit.encoder.layer.0.attention.attention.value.bias"] = torch.zeros(7)
    refused(theirs, tmp_path, r"value\.bias \(7,\) where the model has \(32,\)")


@pytest.mark.parametrize(
    "name", ["test_vit", "vit_tiny_patch16_224", "vit_xsmall_patch16_clip_224", "deit3_small_patch16_224"]
)
def test_timms_own_weights_give_timms_own_features(name, tmp_path, caplog):
    torch.manual_seed(1)
    theirs = timm.create_model(name, img_size=(16, 24), patch_size=8, num_classes=10).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    decoder = VitDecoder(width=16, depth=1, heads=2)
    model = build_model(TimmVitConfig(name=name, patch=8, decoder=decoder), (16, 24), 3).eval()
    with caplog.at_level(logging.INFO):
        fresh = load_weights(model, tmp_path / "weights.safetensors")
    assert all(each.startswith(("decoder", "mask_token")) for each in fresh)
    assert "left out, being a classifier's: head.bias, head.weight" in caplog.text
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        expected = theirs.forward_features(images)[:, theirs.num_prefix_tokens :]
        torch.testing.assert_close(model.encode(images), expected, atol=1e-5, rtol=0)


def test_positions_of_cells_alone_are_resampled_too(tmp_path, caplog):
    config = TimmVitConfig(name="deit3_small_patch16_224", patch=8, decoder=VitDecoder(width=16, depth=1, heads=2))
    save_file(build_model(config, (16, 16), 3).state_dict(), tmp_path / "weights.safetensors")
    model = build_model(config, (16, 24), 3)
    with caplog.at_level(logging.INFO):
        load_weights(model, tmp_path / "weights.safetensors")
    assert "pos_embed resampled from 2 × 2 to 2 × 3" in caplog.text

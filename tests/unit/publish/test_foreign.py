"""Exports are opened by those they are for: timm here, the authors' names and Hugging Face's through `init_from`."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from maskray import cli
from maskray.config.load import dump, merge, parse
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, ConfigError, DataError, StorageError
from maskray.models.base import MaskedAutoencoder
from maskray.models.build import initial_model
from maskray.models.encoder import CARD, load_encoder, save_encoder
from maskray.models.foreign import WEIGHTS_FILE, load_weights
from maskray.models.normalize import IMAGENET_MEAN, Normalize
from maskray.publish import foreign
from maskray.publish.foreign import CONFIG, EXPORT_FORMATS, PROCESSOR
from maskray.publish.proof import BATCHES, LIMIT, PROOF
from maskray.publish.subject import open_subject
from maskray.training import checkpoint
from maskray.training.optim import build_optimizer

DECODER = {"width": 16, "depth": 1, "heads": 2}
VIT = {"patch": 4, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 3, "decoder": DECODER}
RUN = {
    "name": "tiny",
    "data": {"path": "unused", "image_size": 16, "normalize": "imagenet"},
    "mask": {"ratio": 0.5},
    "optim": {"steps": 10, "global_batch": 64},
}
MODELS = {
    "the authors'": {},
    "registers, no class token": {"model": {"class_token": False, "registers": 2}},
    "oblong, gray": {"model": {"patch": [2, 4]}, "data": {"image_size": [8, 24], "channels": 1}},
    "five channels": {"data": {"channels": 5, "normalize": "symmetric"}},
    "timm's": {"model": {"kind": "timm_vit", "name": "test_vit", "patch": 4, "decoder": DECODER}},
    "timm's, positions of cells alone": {
        "model": {"kind": "timm_vit", "name": "deit3_small_patch16_224", "patch": 4, "decoder": DECODER}
    },
    "timm's, one that pools over all tokens": {
        "model": {"kind": "timm_vit", "name": "test_vit3", "patch": 4, "decoder": DECODER}
    },
    "timm's, registers": {
        "model": {"kind": "timm_vit", "name": "vit_wee_patch16_reg1_gap_256", "patch": 4, "decoder": DECODER}
    },
}


def export(source: str | Path, destination: str | Path, kind: str) -> foreign.Export:
    return foreign.export(open_subject(str(source), TrackingConfig(), str(source), "source"), destination, kind)


def config_of(**sections: object) -> RunConfig:
    return parse(RunConfig, merge(merge(RUN, {"model": {"kind": "vit", **VIT}}), sections))


def trained(config: RunConfig) -> MaskedAutoencoder:
    """Not as it starts: zero biases and equal norms would hide one taken for another."""
    model = initial_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def checkpoint_of(model: MaskedAutoencoder, config: RunConfig, folder: Path) -> Path:
    folder.mkdir()
    facts = checkpoint.Facts(10, "0123456789abcdef", 1, 1, {}, [])
    checkpoint.HostCopy(model, build_optimizer(model, config.optim), facts, dump(config)).write(folder)
    return folder


def encoder_of(model: MaskedAutoencoder, config: RunConfig, folder: Path) -> Path:
    save_encoder(folder, model, Normalize.from_kind(config.data.normalize, config.data.channels), config)
    return folder


Maker = Callable[[MaskedAutoencoder, RunConfig, Path], Path]


@pytest.mark.parametrize("made", [checkpoint_of, encoder_of])
@pytest.mark.parametrize("sections", MODELS.values(), ids=MODELS)
def test_timm_opens_the_encoder_strictly_and_computes_our_features(sections: dict, made: Maker, tmp_path: Path):
    config = config_of(**sections)
    model = trained(config)
    export(made(model, config, tmp_path / "source"), tmp_path / "out", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    theirs.load_state_dict(load_file(tmp_path / "out" / WEIGHTS_FILE), strict=True)
    images = torch.randn(2, config.data.channels, *config.data.image_size)
    with torch.no_grad():
        features = theirs.forward_features(images)[:, theirs.num_prefix_tokens :]
        torch.testing.assert_close(features, model.encode(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs(images), model.pooled(images), atol=1e-5, rtol=0)


CONVOLUTIONAL = {
    "ResNet": ("resnet18", {"kind": "unet", "width": 64}),
    "ResNet-D": ("resnet26d", {"kind": "unet", "width": 64}),
    "ConvNeXt V2": ("convnextv2_atto", {"kind": "block", "width": 32}),
    "ConvNeXt": ("convnext_atto", {"kind": "block", "width": 32}),
}


@pytest.mark.parametrize("made", [checkpoint_of, encoder_of])
@pytest.mark.parametrize(("name", "decoder"), CONVOLUTIONAL.values(), ids=CONVOLUTIONAL)
def test_timm_opens_a_convolutional_encoder_and_its_weights_come_back(
    name: str, decoder: dict, made: Maker, tmp_path: Path
):
    config = config_of(
        data={"image_size": [64, 96]},
        model={"kind": "sparse_conv", "name": name, "decoder": decoder},
        mask={"ratio": 0.5},
    )
    model = trained(config)
    export(made(model, config, tmp_path / "source"), tmp_path / "out", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    theirs.load_state_dict(load_file(tmp_path / "out" / WEIGHTS_FILE), strict=True)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.forward_features(images), model.feature_maps(images)[-1], atol=1e-5, rtol=1e-5
        )

    fresh = initial_model(config.model_copy(update={"seed": 5}))
    assert all(name.startswith("decoder") for name in load_weights(fresh, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(fresh.eval().pooled(images), model.pooled(images))


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_weights_of_timms_own_convolutional_models_are_read_without_their_head(name: str, tmp_path: Path):
    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=5).eval()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    decoder = {"kind": "block", "width": 32}
    config = config_of(
        data={"image_size": 64}, model={"kind": "sparse_conv", "name": name, "decoder": decoder}, mask={"ratio": 0.5}
    )
    model = initial_model(config).eval()
    load_weights(model, tmp_path / "theirs.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model.feature_maps(images)[-1], theirs.forward_features(images), atol=1e-5, rtol=1e-5
        )


def test_timm_is_told_how_images_are_normalised_and_may_put_a_head_on(tmp_path: Path):
    config = config_of()
    export(encoder_of(trained(config), config, tmp_path / "source"), tmp_path / "out", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert theirs(torch.zeros(1, 3, 16, 16)).shape == (1, 7)
    known = timm.data.resolve_model_data_config(theirs)
    assert known["input_size"] == (3, 16, 16)
    assert known["mean"] == pytest.approx(IMAGENET_MEAN)


@pytest.mark.parametrize(("kind", "name"), [("mae", "out.pth"), ("hf", "out")])
def test_a_checkpoint_comes_back_to_the_bit(kind: str, name: str, tmp_path: Path):
    config = config_of()
    model = trained(config)
    export(checkpoint_of(model, config, tmp_path / "source"), tmp_path / name, kind)
    again = initial_model(config)
    assert load_weights(again, tmp_path / name) == ()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_authors_file_holds_their_names_alone(tmp_path: Path):
    config = config_of()
    model = trained(config)
    export(checkpoint_of(model, config, tmp_path / "source"), tmp_path / "out.pth", "mae")
    file = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(file) == ["model"]
    assert file["model"].keys() == model.state_dict().keys()


def test_hugging_face_is_told_sizes_masks_and_how_images_are_normalised(tmp_path: Path):
    config = config_of()
    export(checkpoint_of(trained(config), config, tmp_path / "source"), tmp_path / "out", "hf")
    told = json.loads((tmp_path / "out" / CONFIG).read_text())
    expected = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "decoder_hidden_size": 16,
        "decoder_intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 3,
        "layer_norm_eps": 1e-6,
        "mask_ratio": 0.5,
        "norm_pix_loss": True,
    }
    assert {key: told[key] for key in expected} == expected
    assert json.loads((tmp_path / "out" / PROCESSOR).read_text())["image_mean"] == pytest.approx(IMAGENET_MEAN)


def test_an_encoder_alone_hides_nothing_at_hugging_face(tmp_path: Path):
    config = config_of()
    model = trained(config)
    export(encoder_of(model, config, tmp_path / "source"), tmp_path / "out", "hf")
    told = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (told["architectures"], told["mask_ratio"]) == (["ViTMAEModel"], 0.0)
    again = initial_model(config)
    assert len(load_weights(again, tmp_path / "out")) > 0
    assert torch.equal(again.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_a_checkpoint_is_read_from_any_place(place: str, tmp_path: Path):
    config = config_of()
    folder = checkpoint_of(trained(config), config, tmp_path / "source")
    storage = Storage(f"{place}/checkpoint")
    for file in folder.iterdir():
        storage.write_bytes(file.name, file.read_bytes())
    export(storage.uri, tmp_path / "out" / "deeper.pth", "mae")
    assert torch.load(tmp_path / "out" / "deeper.pth", weights_only=True)["model"]


def test_a_datasets_own_statistics_are_told(tiny: Callable[..., RunConfig], digits: Path, tmp_path: Path):
    config = tiny(data={"normalize": "dataset"})
    source = checkpoint_of(trained(config), config, tmp_path / "source")
    assert f"mean {Dataset.open(digits).manifest.mean[0]:.4f}," in export(source, tmp_path / "out", "timm").takes
    gone = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "gone")})})
    source = checkpoint_of(trained(gone), gone, tmp_path / "other")
    with pytest.raises(DataError, match="gone"):
        export(source, tmp_path / "again", "timm")


REFUSED = [
    (
        "mae",
        {"model": {"kind": "conv", "widths": [4, 8]}},
        r"model\.kind: mae has no names.*Found: conv.*Allowed: vit\.",
    ),
    ("timm", {"model": {"kind": "conv", "widths": [4, 8]}}, r"model\.kind.*Allowed: vit or timm_vit"),
    (
        "hf",
        {"model": {"kind": "timm_vit", "name": "test_vit", "patch": 4, "decoder": DECODER}},
        r"model\.kind: hf has no",
    ),
    ("mae", {"model": {"registers": 2}}, r"model\.registers.*Found: 2\. Allowed: 0\. What to do: export it as timm"),
    ("hf", {"model": {"class_token": False}}, r"model\.class_token.*Found: False\. Allowed: True"),
    ("hf", {"model": {"decoder": {"attention": "cross"}}}, r"model\.decoder\.attention.*Found: cross\. Allowed: self"),
    ("hf", {"data": {"image_size": [16, 8]}}, r"data\.image_size.*Found: \[16, 8\]\. Allowed: \[16, 16\] or \[8, 8\]"),
    ("hf", {"model": {"patch": [2, 4]}}, r"model\.patch.*Found: \[2, 4\]\. Allowed: \[2, 2\] or \[4, 4\]"),
]


@pytest.mark.parametrize(("kind", "sections", "says"), REFUSED)
def test_a_model_that_they_do_not_have_is_refused(kind: str, sections: dict, says: str, tmp_path: Path):
    config = config_of(**sections)
    source = checkpoint_of(trained(config), config, tmp_path / "source")
    with pytest.raises(ConfigError, match=says):
        export(source, tmp_path / ("out.pth" if kind == "mae" else "out"), kind)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("mae", "out", r"is a file that torch\.load reads"),
        ("timm", "out.pth", "is a folder"),
        ("timm", "s3://bucket/out", "written on this machine"),
        ("timm", "source", "replaces nothing"),
    ],
)
def test_a_destination_that_does_not_do_is_refused(kind: str, name: str, says: str, tmp_path: Path):
    config = config_of()
    source = encoder_of(trained(config), config, tmp_path / "source")
    with pytest.raises(ConfigError, match=says):
        export(source, name if "://" in name else tmp_path / name, kind)


def test_a_destination_that_cannot_be_written_is_named(tmp_path: Path):
    config = config_of()
    source = encoder_of(trained(config), config, tmp_path / "source")
    with pytest.raises(StorageError, match=rf"cannot be written.*{WEIGHTS_FILE}/out"):
        export(source, source / WEIGHTS_FILE / "out", "timm")


def test_a_source_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"neither a checkpoint nor an encoder.*gone.*encoder\.json"):
        export(tmp_path / "gone", tmp_path / "out", "timm")


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path):
    config = config_of()
    source = checkpoint_of(trained(config), config, tmp_path / "source")
    (source / checkpoint.WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        export(source, tmp_path / "out", "timm")


def test_the_command_says_how_to_open_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = config_of()
    source = encoder_of(trained(config), config, tmp_path / "source")
    assert cli.main(["export", str(source), str(tmp_path / "out"), "--as", "timm"]) == 0
    said = capsys.readouterr().out
    assert f'timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)' in said
    assert "minus mean 0.4850, 0.4560, 0.4060, by std" in said
    assert cli.main(["export", str(source), str(tmp_path / "out"), "--as", "timm"]) == cli.USER_MISTAKE
    assert "replaces nothing" in " ".join(capsys.readouterr().err.split())


GRAPHS = {
    "ours": {},
    "gray, wide": {"data": {"channels": 1, "image_size": [16, 32], "normalize": "symmetric"}},
    "timm's, registers": MODELS["timm's, registers"],
    "ResNet": {
        "data": {"image_size": 64},
        "mask": {"ratio": 0.5},
        "model": {"kind": "sparse_conv", "name": "resnet18", "decoder": {"kind": "unet", "width": 64}},
    },
    "ConvNeXt V2": {
        "data": {"image_size": 64},
        "mask": {"ratio": 0.5},
        "model": {"kind": "sparse_conv", "name": "convnextv2_atto", "decoder": {"kind": "block", "width": 32}},
    },
    "conv": {"model": {"kind": "conv", "widths": [4, 8]}, "mask": {"kind": "block", "sides": [1, 2]}},
}


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("sections", GRAPHS.values(), ids=GRAPHS)
def test_a_graph_takes_any_number_of_images_and_gives_our_features(sections: dict, kind: str, tmp_path: Path):
    config = config_of(**sections)
    source = encoder_of(trained(config), config, tmp_path / "source")
    found = export(source, tmp_path / "out", kind)
    assert found.proof.largest_difference < LIMIT
    told = json.loads((tmp_path / "out" / PROOF).read_text())
    assert told["batches"] == list(BATCHES) == [1, 3, 64]
    assert told["largest_difference"] == found.proof.largest_difference

    images = torch.randint(0, 256, (5, config.data.channels, *config.data.image_size), dtype=torch.uint8)
    scope: dict = {"images": images.numpy() if kind == "onnx" else images}
    import onnxruntime

    scope |= {"onnxruntime": onnxruntime, "torch": torch}
    with torch.no_grad():
        features = eval(found.how_to_open, scope)  # as it is said, to the letter
        expected = load_encoder(source)(images)
    features = torch.from_numpy(features[0]) if kind == "onnx" else features
    torch.testing.assert_close(features, expected, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("kind", EXPORT_FORMATS)
def test_what_gives_other_features_is_no_export_and_is_not_left_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of()
    source = checkpoint_of(trained(config), config, tmp_path / "source")
    subject = open_subject(str(source), TrackingConfig(), str(tmp_path), "source")
    wrong = copy.deepcopy(subject.encoder)
    with torch.no_grad():
        wrong.model.norm.bias[3] += 0.001
    taken_wrongly = foreign._source_of(subject._replace(encoder=wrong))
    monkeypatch.setattr(foreign, "_source_of", lambda _: taken_wrongly)
    place = tmp_path / "exports" / ("out.pth" if kind == "mae" else "out")
    with pytest.raises(CheckpointError, match=r"gives other features. Found: a difference of 0\.001"):
        foreign.export(subject, place, kind)
    assert list(place.parent.iterdir()) == []


def test_every_export_says_what_opened_it(tmp_path: Path):
    config = config_of()
    source = checkpoint_of(trained(config), config, tmp_path / "source")
    by = {kind: export(source, tmp_path / f"out-{kind}{'.pth' * (kind == 'mae')}", kind) for kind in EXPORT_FORMATS}
    assert by["timm"].proof.opened_by.startswith("timm ")
    assert by["onnx"].proof.opened_by.startswith("onnxruntime ")
    assert (tmp_path / "out-mae.pth.proof.json").exists()
    assert all(each.proof.largest_difference <= 1e-5 for each in by.values())


def test_the_command_line_knows_all_formats():
    assert cli.export.FORMATS == EXPORT_FORMATS


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_prove_nothing(wrong: float, tmp_path: Path):
    config = config_of()
    subject = open_subject(
        str(checkpoint_of(trained(config), config, tmp_path / "source")), TrackingConfig(), str(tmp_path), "source"
    )
    with torch.no_grad():
        subject.encoder.model.norm.bias[3] = wrong
    with pytest.raises(CheckpointError, match="gives other features"):
        foreign.export(subject, tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


def test_others_are_told_the_mean_std_and_resizing_of_training(tmp_path: Path):
    config = config_of()
    model = trained(config)
    source, normalize = tmp_path / "source", Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    save_encoder(source, model, normalize, config)
    export(source, tmp_path / "timm", "timm")
    known = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True))
    assert known["mean"] == pytest.approx((0.1, 0.2, 0.3))
    assert known["std"] == pytest.approx((0.4, 0.5, 0.6))
    assert (known["interpolation"], known["crop_pct"], known["crop_mode"]) == ("bicubic", 1.0, "squash")
    assert known["input_size"] == (3, 16, 16)
    export(source, tmp_path / "hf", "hf")
    told = json.loads((tmp_path / "hf" / PROCESSOR).read_text())
    assert told["image_mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert told["image_std"] == pytest.approx([0.4, 0.5, 0.6])
    assert (told["resample"], told["size"]) == (3, {"height": 16, "width": 16})
    assert told["rescale_factor"] == 1 / 255


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.1, 0.2]},
        {"std": [1, 1, 0]},
        {"std": [1, 1, float("nan")]},
        {"image_size": [16]},
        {"channels": "three"},
    ],
)
def test_an_encoder_whose_card_makes_no_sense_is_refused(change: dict, tmp_path: Path):
    config = config_of()
    source = encoder_of(trained(config), config, tmp_path / "source")
    card = json.loads((source / CARD).read_text()) | change
    (source / CARD).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="the encoder is damaged"):
        load_encoder(source)


@pytest.mark.parametrize("content", [b"[1]", b"\xff\xfe", b"3"])
def test_a_card_that_is_none_is_refused(content: bytes, tmp_path: Path):
    config = config_of()
    source = encoder_of(trained(config), config, tmp_path / "source")
    (source / CARD).write_bytes(content)
    with pytest.raises(CheckpointError, match="is no encoder"):
        load_encoder(source)


def test_an_encoder_of_weights_that_are_no_numbers_is_refused(tmp_path: Path):
    config = config_of()
    model = trained(config)
    with torch.no_grad():
        model.norm.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match="no finite numbers"):
        load_encoder(encoder_of(model, config, tmp_path / "source"))

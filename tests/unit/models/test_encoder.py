import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize_image

from maskray.config.load import parse
from maskray.config.schema import RunConfig
from maskray.errors import CheckpointError, DataError
from maskray.models.build import build_model
from maskray.models.encoder import CARD, WEIGHTS, load_encoder, resize, save_encoder
from maskray.models.normalize import Normalize
from maskray.models.vit import MaskedAutoencoderViT

Made = tuple[RunConfig, MaskedAutoencoderViT, Normalize]


def config_of(channels: int = 3, positions: str = "fixed") -> RunConfig:
    size = {"width": 16, "depth": 2, "heads": 2}
    return parse(
        RunConfig,
        {
            "name": "tiny",
            "data": {"path": "unused", "image_size": [8, 12], "channels": channels},
            "model": {"patch": [2, 4], "positions": positions, "decoder": size, **size},
            "optim": {"steps": 10, "global_batch": 64},
        },
    )


@pytest.fixture
def made() -> Made:
    torch.manual_seed(0)
    config = config_of()
    return config, build_model(config.model, (8, 12), 3), Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("channels", "positions"), [(1, "fixed"), (3, "learnable")])
def test_features_survive_to_the_bit(tmp_path: Path, channels: int, positions: str) -> None:
    config = config_of(channels, positions)
    model = build_model(config.model, (8, 12), channels).eval()
    torch.nn.init.normal_(model.pos_embed)  # trained positions must not be drawn anew
    normalize = Normalize([0.4] * channels, [0.3] * channels)
    save_encoder(tmp_path / "encoder", model, normalize, config)
    encoder = load_encoder(tmp_path / "encoder")
    batch = images(5, channels, 8, 12)
    with torch.no_grad():
        expected = model.pooled(normalize(batch))
    assert torch.equal(encoder(batch), expected)
    assert (encoder.channels, encoder.width, encoder.image_size) == (channels, 16, (8, 12))
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_only_the_encoder_is_kept(tmp_path: Path, made: Made) -> None:
    config, model, normalize = made
    save_encoder(tmp_path, model, normalize, config)
    kept = set(load_encoder(tmp_path).model.state_dict())
    assert kept == {n for n in model.state_dict() if not n.startswith(("decoder_", "mask_token"))}
    assert sorted(f.name for f in tmp_path.iterdir()) == [CARD, WEIGHTS]
    card = json.loads((tmp_path / CARD).read_text())
    assert card["image_size"] == [8, 12]
    np.testing.assert_allclose(card["mean"], [0.4, 0.5, 0.6], rtol=1e-6)


def test_loading_leaves_the_generator_alone(tmp_path: Path, made: Made) -> None:
    config, model, normalize = made
    save_encoder(tmp_path, model, normalize, config)
    before = torch.get_rng_state()
    load_encoder(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_sizes_are_resized_as_training_does(tmp_path: Path, made: Made) -> None:
    config, model, normalize = made
    save_encoder(tmp_path, model, normalize, config)
    encoder = load_encoder(tmp_path)
    large = images(2, 3, 31, 45)
    as_trained = torch.stack([resize_image(i, [8, 12], InterpolationMode.BICUBIC, antialias=True) for i in large])
    assert torch.equal(resize(large, (8, 12)), as_trained)
    assert torch.equal(encoder(large), encoder(as_trained))
    assert resize(as_trained, (8, 12)) is as_trained


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 8, 12), images(1, 1, 8, 12), images(3, 8, 12)])
def test_what_are_no_images_is_refused(tmp_path: Path, made: Made, bad: torch.Tensor) -> None:
    config, model, normalize = made
    save_encoder(tmp_path, model, normalize, config)
    with pytest.raises(DataError, match=r"uint8 of shape \(images, 3, height, width\)"):
        load_encoder(tmp_path)(bad)


def _no_card(folder: Path) -> None:
    (folder / CARD).unlink()


def _other_version(folder: Path) -> None:
    (folder / CARD).write_text(json.dumps(json.loads((folder / CARD).read_text()) | {"schema_version": 99}))


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])


def _other_model(folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    card["model"]["depth"] = 3
    (folder / CARD).write_text(json.dumps(card))


def _card_without_model(folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    del card["model"]
    (folder / CARD).write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_no_card, "no encoder"),
        (_other_version, "schema version"),
        (_no_weights, "damaged"),
        (_cut_weights, "damaged"),
        (_other_model, "damaged"),
        (_card_without_model, "damaged"),
    ],
)
def test_damage_is_named(tmp_path: Path, made: Made, damage: Callable[[Path], None], says: str) -> None:
    config, model, normalize = made
    save_encoder(tmp_path, model, normalize, config)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        load_encoder(tmp_path)

"""The MAE authors' own numbers, from their own weights: loss, predictions, latents and every gradient's norm."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskray.config.models import ObjectiveConfig, VitConfig, VitDecoder
from maskray.models.build import build_model
from maskray.objective import Objective

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
NAMES = ["tiny_normpix_75", "tiny_raw_50"]

# Relative for the loss and the gradient norms; predictions and latents are of order 1, so absolute for them.
TOLERANCE = {
    torch.float64: {"loss": 1e-6, "values": 1e-9, "gradient_norms": 1e-9},
    torch.float32: {"loss": 1e-5, "values": 1e-4, "gradient_norms": 1e-4},
}


@pytest.fixture(params=NAMES)
def vectors(request):
    folder = VECTORS / request.param
    if not folder.is_dir():
        pytest.skip(f"conformance vectors {request.param}: {folder} is not here")
    with np.load(folder / "io.npz") as file:
        arrays = dict(file)
    return json.loads((folder / "config.json").read_text()), arrays, load_file(folder / "weights.safetensors")


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    return request.param


def build(shape):
    config = VitConfig(
        patch=shape["patch_size"],
        width=shape["encoder_dim"],
        depth=shape["encoder_depth"],
        heads=shape["encoder_heads"],
        mlp_ratio=shape["mlp_ratio"],
        decoder=VitDecoder(
            width=shape["decoder_dim"],
            depth=shape["decoder_depth"],
            heads=shape["decoder_heads"],
            mlp_ratio=shape["mlp_ratio"],
        ),
    )
    return build_model(config, (shape["image_size"],) * 2, 3)


def test_numbers_are_the_authors(vectors, dtype):
    shape, arrays, weights = vectors
    model = build(shape)
    model.load_state_dict(weights, strict=True)
    model.to(dtype)
    images = torch.from_numpy(arrays["images"]).to(dtype)
    visible = ~torch.from_numpy(arrays["hidden"]).reshape(-1, *model.grid_HW)
    num_visible = int(visible[0].sum())
    within = TOLERANCE[dtype]

    pred = model(images, visible, num_visible)
    loss = Objective(ObjectiveConfig(norm_pix=shape["norm_pix"]), model.cell_HW)(images, pred, ~visible).mean()
    loss.backward()
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=within["loss"])
    close(pred, arrays["pred"], within["values"])

    # Theirs keep the order of the noise, ours the order of the image: place i of theirs is our cell's place in raster.
    latent = model.encode_visible(images, visible, num_visible)
    places = torch.from_numpy(arrays["noise"]).argsort(1)[:, :num_visible].argsort(1).argsort(1)
    cells = latent[:, 1:].gather(1, places[:, :, None].expand(-1, -1, latent.shape[2]))
    close(torch.cat((latent[:, :1], cells), dim=1), arrays["latent"], within["values"])

    parameters = dict(model.named_parameters())
    expected = dict(zip(arrays["grad_names"].tolist(), arrays["grad_norms"].tolist(), strict=True))
    assert set(expected) == {name for name, parameter in parameters.items() if parameter.requires_grad}
    for name, norm in expected.items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=within["gradient_norms"]), name


def test_positions_are_the_authors_to_the_bit(vectors):
    shape, _, weights = vectors
    state = build(shape).state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        assert torch.equal(state[name], weights[name])


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours.double(), torch.from_numpy(theirs).double(), rtol=0, atol=tolerance)

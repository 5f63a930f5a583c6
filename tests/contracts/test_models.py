"""What every model keeps. The checks are functions, so that a model that breaks one can be seen to fail it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maskray import masking
from maskray.config.schema import ObjectiveConfig, RandomMask, VitConfig, VitDecoder
from maskray.models.build import build_model
from maskray.models.vit import MaskedAutoencoderViT
from maskray.objective import Objective

DECODER = VitDecoder(width=48, depth=1, heads=3)
CASES = {
    "square RGB": (VitConfig(patch=4, width=32, depth=2, heads=4, decoder=DECODER), (16, 16), 3),
    "wide gray, oblong patch": (VitConfig(patch=(4, 2), width=32, depth=1, heads=2, decoder=DECODER), (8, 12), 1),
    "tall, five channels": (VitConfig(patch=4, width=32, depth=1, heads=2, decoder=DECODER), (24, 8), 5),
    "learnable positions": (
        VitConfig(patch=4, width=32, depth=1, heads=2, positions="learnable", decoder=DECODER),
        (16, 16),
        3,
    ),
}
MASK = RandomMask(ratio=0.6)


def build(case, seed=0):
    torch.manual_seed(seed)
    return build_model(*CASES[case])


def batch(model, num_images=6, seed=1):
    size = [cells * pixels for cells, pixels in zip(model.grid_HW, model.patch_HW, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, model.channels, *size, generator=generator)
    visible = torch.from_numpy(
        masking.draw(MASK, model.grid_HW, seed=seed, pass_=0, rows=np.arange(num_images), view=0)
    )
    return images, visible, masking.num_visible(MASK, model.grid_HW)


def pixels_of(cells_BHW, model):
    return cells_BHW.repeat_interleave(model.patch_HW[0], 1).repeat_interleave(model.patch_HW[1], 2)[:, None]


def encoding_moves_with_hidden_pixels(model):
    """True if any change of hidden pixels changes any bit of what the encoder hands on, or of the predictions."""
    images, visible, num_visible = batch(model)
    shown = pixels_of(visible, model)
    with torch.no_grad():
        encoding, pred = model.encode_visible(images, visible, num_visible), model(images, visible, num_visible)
        for other in (torch.zeros_like(images), images.flip(0), 1e4 * torch.ones_like(images)):
            changed = torch.where(shown, images, other)
            if not torch.equal(encoding, model.encode_visible(changed, visible, num_visible)):
                return True
            if not torch.equal(pred, model(changed, visible, num_visible)):
                return True
    return False


def encoding_moves_with_visible_pixels(model):
    """True if changing each visible cell changes the encoding of its own image, and of no other."""
    images, visible, num_visible = batch(model)
    with torch.no_grad():
        before = model.encode_visible(images, visible, num_visible)
        for b, row, column in visible.nonzero().tolist():
            one_cell = torch.zeros_like(visible)
            one_cell[b, row, column] = True
            after = model.encode_visible(images + pixels_of(one_cell, model), visible, num_visible)
            moved = (before != after).flatten(1).any(dim=1)
            if moved.tolist() != [i == b for i in range(len(images))]:
                return False
    return True


def predictions_differ_by_position(model):
    """True if no two hidden cells of an image get the same prediction (all-zero positions are how they would)."""
    images, visible, num_visible = batch(model)
    with torch.no_grad():
        pred_BLP = model(images, visible, num_visible)
    for pred_LP, hidden_L in zip(pred_BLP, ~visible.flatten(1), strict=True):
        distances = torch.cdist(pred_LP[hidden_L], pred_LP[hidden_L])
        distances.fill_diagonal_(torch.inf)
        if distances.min() < 1e-3:
            return False
    return True


class LeakyViT(MaskedAutoencoderViT):
    """Smooths the image before it is cut into cells: a visible cell's border then carries its hidden neighbours."""

    def _cells(self, images_BCHW):
        return super()._cells(torch.nn.functional.avg_pool2d(images_BCHW, 3, stride=1, padding=1))


class LostPositionsViT(MaskedAutoencoderViT):
    """A decoder whose positions were zeroed on the way, as happens in a well-known library."""

    def __init__(self, *args):
        super().__init__(*args)
        self.decoder_pos_embed.data.zero_()


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_hidden_pixels_cannot_move_the_encoding_by_a_bit(case):
    assert not encoding_moves_with_hidden_pixels(build(case))


def test_the_leak_check_catches_a_leak():
    assert encoding_moves_with_hidden_pixels(LeakyViT(*CASES["square RGB"]))


def test_every_visible_cell_moves_the_encoding_of_its_image_alone(case):
    assert encoding_moves_with_visible_pixels(build(case))


def test_predictions_differ_by_position(case):
    assert predictions_differ_by_position(build(case))


def test_the_position_check_catches_lost_positions():
    assert not predictions_differ_by_position(LostPositionsViT(*CASES["square RGB"]))


def test_shapes(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    cells = model.grid_HW[0] * model.grid_HW[1]
    width = CASES[case][0].width
    with torch.no_grad():
        assert model(images, visible, num_visible).shape == (6, cells, model.cell_pixels)
        assert model.encode_visible(images, visible, num_visible).shape == (6, 1 + num_visible, width)
        assert model.encode(images).shape == (6, cells, width)
        assert model.pooled(images).shape == (6, width)
    assert model.cell_pixels == model.patch_HW[0] * model.patch_HW[1] * model.channels


def test_encode_never_masks(case):
    """All pixels matter, in training mode too, and all-visible gives the same as encode()."""
    model = build(case)
    images, visible, _ = batch(model)
    everything = torch.ones_like(visible)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            features = model.encode(images)
            assert torch.equal(features, model.encode(images))
            seen = model.encode_visible(images, everything, visible[0].numel())[:, 1:]
        torch.testing.assert_close(features, seen)


def test_every_learned_parameter_gets_a_gradient(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    objective = Objective(ObjectiveConfig(), model.patch_HW)
    objective(images, model(images, visible, num_visible), visible).mean().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any())
    ]
    assert without == []
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    learnable = CASES[case][0].positions == "learnable"
    assert fixed == (set() if learnable else {"pos_embed", "decoder_pos_embed"})


def test_an_image_does_not_depend_on_its_batch(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    with torch.no_grad():
        together = model(images, visible, num_visible)
        alone = torch.cat([model(images[i : i + 1], visible[i : i + 1], num_visible) for i in range(len(images))])
    torch.testing.assert_close(together, alone)


def test_the_seed_makes_the_weights(case):
    first, same, other = build(case, 0).state_dict(), build(case, 0).state_dict(), build(case, 1).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["cls_token"], other["cls_token"])


def test_saved_weights_give_the_same_bits(case, tmp_path):
    model, fresh = build(case, 0), build(case, 1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    given = batch(model)
    with torch.no_grad():
        assert torch.equal(model(*given), fresh(*given))


@pytest.mark.parametrize(("patch", "channels", "width"), [(2, 3, 192), (4, 3, 64), (4, 1, 192), (8, 3, 512)])
def test_the_loss_at_step_0_is_the_one_that_the_initialisation_promises(patch, channels, width):
    """(P-1)/P + 2D/(D+P) under norm_pix within 10 %, on white noise (no cell of it is flat), mean of 12 seeds.

    One seed of a small head is not enough: the tokens have much in common, so few of its rows decide.
    """
    config = VitConfig(patch=patch, width=64, depth=1, heads=2, decoder=VitDecoder(width=width, depth=1, heads=4))
    losses = []
    for seed in range(12):
        torch.manual_seed(seed)
        model = build_model(config, (4 * patch, 4 * patch), channels)
        images, visible, num_visible = batch(model, num_images=32)
        with torch.no_grad():
            pred = model(images, visible, num_visible)
            losses.append(Objective(ObjectiveConfig(norm_pix=True), model.patch_HW)(images, pred, visible).mean())
    P = model.cell_pixels
    assert torch.stack(losses).mean().item() == pytest.approx((P - 1) / P + 2 * width / (width + P), rel=0.1)


def test_nothing_waits_for_the_device(case):
    """Tensors without values: whatever would have to look at one raises. Shapes are known to the host."""
    model = build(case).to("meta")
    images, visible, num_visible = (t.to("meta") if torch.is_tensor(t) else t for t in batch(model))
    pred = model(images, visible, num_visible)
    loss = Objective(ObjectiveConfig(), model.patch_HW)(images, pred, visible)
    assert loss.shape == (6,)
    loss.mean().backward()


def test_compiles_in_place_as_one_graph(case):
    model = build(case)
    given, names = batch(model), list(model.state_dict())
    with torch.no_grad():
        eager = model(*given)
        model.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(*given), eager)
    assert list(model.state_dict()) == names


def test_bf16_autocast_keeps_the_loss_in_fp32(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    objective = Objective(ObjectiveConfig(), model.patch_HW)
    with torch.no_grad():
        full = objective(images, model(images, visible, num_visible), visible)
        with torch.autocast("cpu", torch.bfloat16):
            pred = model(images, visible, num_visible)
            loss = objective(images, pred, visible)
    assert pred.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=0.03, atol=0)

"""What every model keeps, under every mask and target that go with it.

The checks are functions, so that a model that breaks one can be seen to fail it.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maskray import masking
from maskray.config.models import (
    BlockDecoder,
    BlockMask,
    ConvConfig,
    ConvDecoder,
    GridMask,
    InverseBlockMask,
    ObjectiveConfig,
    PixelMask,
    RandomMask,
    SparseConvConfig,
    TimmVitConfig,
    UNetDecoder,
    VitConfig,
    VitDecoder,
)
from maskray.models.build import build_model
from maskray.models.conv import ConvAutoencoder
from maskray.models.sparse_conv import SparseConvAutoencoder
from maskray.models.sparse_layers import Seen, drop_statistics, group_norms, settle_statistics
from maskray.models.vit import MaskedAutoencoderViT
from maskray.objective import Objective

GROUP = 3
DECODER = VitDecoder(width=48, depth=1, heads=3)
CROSS = VitDecoder(width=48, depth=2, heads=3, attention="cross")
SMALL = {"width": 32, "depth": 1, "heads": 2}
CASES = {
    "square RGB": (VitConfig(patch=4, width=32, depth=2, heads=4, decoder=DECODER), (16, 16), 3),
    "wide gray, oblong patch": (VitConfig(patch=(4, 2), **SMALL, decoder=DECODER), (8, 16), 1),
    "tall, five channels": (VitConfig(patch=4, **SMALL, decoder=DECODER), (32, 8), 5),
    "learnable positions": (VitConfig(patch=4, **SMALL, positions="learnable", decoder=DECODER), (16, 16), 3),
    "no class token": (VitConfig(patch=4, **SMALL, class_token=False, decoder=DECODER), (16, 16), 3),
    "registers": (VitConfig(patch=4, **SMALL, registers=3, positions="learnable", decoder=DECODER), (16, 16), 3),
    "cross-attention": (VitConfig(patch=4, **SMALL, decoder=CROSS), (16, 16), 3),
    "timm, class token": (TimmVitConfig(name="vit_tiny_patch16_224", patch=4, decoder=DECODER), (16, 16), 3),
    "timm, registers": (TimmVitConfig(name="vit_little_patch16_reg4_gap_256", patch=4, decoder=DECODER), (16, 8), 1),
    "timm, cross-attention": (TimmVitConfig(name="vit_tiny_patch16_224", patch=8, decoder=CROSS), (32, 32), 3),
    "conv": (ConvConfig(widths=(8, 16, 16)), (32, 64), 3),
    "conv, gray": (ConvConfig(widths=(8, 16), decoder=ConvDecoder(depth=2)), (16, 16), 1),
    "ResNet, U-Net": (SparseConvConfig(name="resnet18", decoder=UNetDecoder(width=64)), (64, 128), 3),
    "ResNet-50, block": (SparseConvConfig(name="resnet50", decoder=BlockDecoder(width=32)), (64, 128), 3),
    "ResNet-D, block": (SparseConvConfig(name="resnet26d", decoder=BlockDecoder(width=32)), (64, 128), 3),
    "ConvNeXt, U-Net": (SparseConvConfig(name="convnext_atto", decoder=UNetDecoder(width=64)), (64, 128), 1),
    "ConvNeXt V2, block": (SparseConvConfig(name="convnextv2_atto", decoder=BlockDecoder(width=32)), (64, 128), 3),
}
MASKS = {
    "random": RandomMask(ratio=0.6),
    "block": BlockMask(ratio=0.5, sides=(1, 2)),
    "inverse block": InverseBlockMask(ratio=0.75),
    "grid": GridMask(ratio=0.75),
    "pixels": PixelMask(ratio=0.75),
}
PAIRS = [
    pytest.param(case, mask, id=f"{case} × {mask}")
    for case in CASES
    for mask in MASKS
    if mask != "pixels" or isinstance(CASES[case][0], ConvConfig)
]
OBJECTIVES = {
    "l2, norm_pix": ObjectiveConfig(),
    "l1, raw": ObjectiveConfig(loss="l1", norm_pix=False),
    "l2, raw, all cells": ObjectiveConfig(norm_pix=False, cells="all"),
    "l2, raw, half of the hidden cells": ObjectiveConfig(norm_pix=False, predict_fraction=0.5),
}


def build(case, seed=0, mask="random"):
    config, size, channels = CASES[case]
    torch.manual_seed(seed)
    model = build_model(config, size, channels, (1, 1) if mask == "pixels" else None, GROUP)
    with torch.no_grad():  # what timm starts at zero would hide what stands before it
        for name, parameter in model.named_parameters():
            if name.startswith("encoder") and name.endswith("weight") and not parameter.any():
                parameter.fill_(0.5)
    return model


def batch(model, num_images=6, seed=1, mask="random"):
    size = [cells * pixels for cells, pixels in zip(model.grid_HW, model.cell_HW, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, model.channels, *size, generator=generator)
    (num_visible,) = masking.visible_counts(MASKS[mask], model.grid_HW)
    key = {"seed": seed, "pass_": 0, "rows": np.arange(num_images), "view": 0}
    visible = torch.from_numpy(masking.draw(MASKS[mask], model.grid_HW, num_visible, **key))
    return images, visible, num_visible


def pixels_of(cells_BHW, model):
    return cells_BHW.repeat_interleave(model.cell_HW[0], 1).repeat_interleave(model.cell_HW[1], 2)[:, None]


def encoding_moves_with_hidden_pixels(model, mask="random"):
    """True if any change of hidden pixels changes any bit of what the encoder hands on, or of the predictions."""
    images, visible, num_visible = batch(model, mask=mask)
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


def encoding_moves_with_visible_pixels(model, mask="random"):
    """True if changing each visible cell changes the encoding of its own image, and of no other."""
    images, visible, num_visible = batch(model, mask=mask)
    with torch.no_grad():
        before = model.encode_visible(images, visible, num_visible)
        for b, row, column in visible.nonzero()[::5].tolist():
            one_cell = torch.zeros_like(visible)
            one_cell[b, row, column] = True
            after = model.encode_visible(images + 3 * pixels_of(one_cell, model), visible, num_visible)
            moved = (before != after).flatten(1).any(dim=1)
            if moved.tolist() != [i == b for i in range(len(images))]:
                return False
    return True


def predictions_differ_by_position(model, mask="random"):
    """True if no two hidden cells of an image get the same prediction (all-zero positions are how they would)."""
    images, visible, num_visible = batch(model, mask=mask)
    with torch.no_grad():
        pred_BLP = model(images, visible, num_visible)
    for pred_LP, hidden_L in zip(pred_BLP, ~visible.flatten(1), strict=True):
        different = pred_LP[hidden_L].unique(dim=0)
        if len(different) < hidden_L.sum():
            return False
    return True


class LeakyViT(MaskedAutoencoderViT):
    """Smooths the image before it is cut into cells: a visible cell's border then carries its hidden neighbours."""

    def _cells(self, images_BCHW):
        return super()._cells(torch.nn.functional.avg_pool2d(images_BCHW, 3, stride=1, padding=1))


class LeakyConv(ConvAutoencoder):
    """Masks the hidden map alone, as the description that it comes from did."""

    def _maps(self, images_BCHW, seen):
        return [seen.shown(each) for each in super()._maps(images_BCHW, Seen(None))]


class LeakyResNet(SparseConvAutoencoder):
    """Masks after every layer, but not at the input: it leaks through the first convolution."""

    def _maps(self, images_BCHW, seen):
        once = [True]

        class Late(Seen):
            def shown(self, x):
                return x if once and once.pop() else super().shown(x)

        return super()._maps(images_BCHW, Late(*seen))


class InputOnly(SparseConvAutoencoder):
    """Masks the input alone: no leak, but the pattern of the mask vanishes from layer to layer."""

    def _maps(self, images_BCHW, seen):
        return super()._maps(seen.shown(images_BCHW), Seen(None))


class LostPositionsViT(MaskedAutoencoderViT):
    """A decoder whose positions were zeroed on the way, as happens in a well-known library."""

    def __init__(self, *args):
        super().__init__(*args)
        self.decoder_pos_embed.data.zero_()


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.mark.parametrize(("case", "mask"), PAIRS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hidden_pixels_cannot_move_the_encoding_by_a_bit(case, mask, training):
    assert not encoding_moves_with_hidden_pixels(build(case, mask=mask).train(training), mask)


@pytest.mark.parametrize(
    ("leaky", "like"), [(LeakyViT, "square RGB"), (LeakyConv, "conv"), (LeakyResNet, "ResNet-50, block")]
)
def test_the_leak_check_catches_a_leak(leaky, like):
    config, size, channels = CASES[like]
    more = {LeakyViT: (), LeakyConv: (config.cell,), LeakyResNet: (GROUP,)}[leaky]
    assert encoding_moves_with_hidden_pixels(leaky(config, size, channels, *more))


def test_every_visible_cell_moves_the_encoding_of_its_image_alone(case):
    # In evaluation: in training the images of a row group share the statistics of batch normalisation.
    assert encoding_moves_with_visible_pixels(build(case).eval())


@pytest.mark.parametrize(("case", "mask"), [p for p in PAIRS if "pixels" not in p.id])
def test_predictions_differ_by_position(case, mask):
    assert predictions_differ_by_position(build(case, mask=mask), mask)


def test_the_position_check_catches_lost_positions():
    assert not predictions_differ_by_position(LostPositionsViT(*CASES["square RGB"]))


def hidden_places_are_zero_at_every_scale(model, mask="random"):
    images, visible, _ = batch(model, mask=mask)
    with torch.no_grad():
        maps = model.visible_maps(images, visible)
    shown = [Seen(visible).at(each.shape[2:]) for each in maps]
    return all(bool((each * ~at == 0).all()) and bool(each.any()) for each, at in zip(maps, shown, strict=True))


@pytest.mark.parametrize(("case", "mask"), [p for p in PAIRS if "onv" in p.id or "ResNet" in p.id])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hidden_places_stay_zero_at_every_scale(case, mask, training):
    assert hidden_places_are_zero_at_every_scale(build(case, mask=mask).train(training), mask)


def test_the_check_of_preservation_catches_masks_at_the_input_alone():
    assert not hidden_places_are_zero_at_every_scale(InputOnly(*CASES["ResNet-50, block"], GROUP))


def test_shapes(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    cells = model.grid_HW[0] * model.grid_HW[1]
    with torch.no_grad():
        assert model(images, visible, num_visible).shape == (6, cells, model.cell_pixels)
        assert model.encode(images).shape == (6, cells, model.width)
        assert model.pooled(images).shape == (6, model.width)
        assert model.feature_maps(images)[-1].shape == (6, model.width, *model.grid_HW)
        if isinstance(model, MaskedAutoencoderViT):
            seen = model.num_prefix + num_visible
            assert model.encode_visible(images, visible, num_visible).shape == (6, seen, model.width)
    assert model.cell_pixels == model.cell_HW[0] * model.cell_HW[1] * model.channels


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
            if isinstance(model, MaskedAutoencoderViT):
                seen = model.encode_visible(images, everything, visible[0].numel())[:, model.num_prefix :]
            else:
                seen = model.visible_maps(images, everything)[-1].flatten(2).transpose(1, 2)
        torch.testing.assert_close(features, seen)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_learned_parameter_gets_a_gradient(case, name):
    objective = Objective(OBJECTIVES[name], build(case).cell_HW)
    model = build(case)
    images, visible, num_visible = batch(model)
    num_target = masking.num_target(objective.config, model.grid_HW, num_visible)
    target = ~visible if objective.config.cells == "hidden" else torch.ones_like(visible)
    if objective.config.predict_fraction < 1:
        key = {"seed": 1, "pass_": 0, "rows": torch.arange(len(images)), "view": 0, "xp": torch}
        target = masking.draw_target(visible, num_target, **key)
    pred = model(images, visible, num_visible, target, num_target)
    objective(images, pred, target).mean().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any())
    ]
    assert without == []
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    learnable = getattr(CASES[case][0], "positions", "learnable") == "learnable"
    assert fixed == (set() if learnable else {"pos_embed", "decoder_pos_embed"})


def test_an_image_does_not_depend_on_its_batch(case):
    model = build(case).eval()
    images, visible, num_visible = batch(model)
    with torch.no_grad():
        together = model(images, visible, num_visible)
        alone = torch.cat([model(images[i : i + 1], visible[i : i + 1], num_visible) for i in range(len(images))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_row_group_does_not_depend_on_its_batch_in_training(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    with torch.no_grad():
        together = model(images, visible, num_visible)
        parts = [slice(at, at + GROUP) for at in range(0, len(images), GROUP)]
        alone = torch.cat([model(images[part], visible[part], num_visible) for part in parts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["ResNet-50, block", "ResNet, U-Net"])
def test_running_statistics_are_those_of_the_step_however_it_is_cut(case):
    def after(cuts, weights):
        model = build(case)
        images, visible, num_visible = batch(model, num_images=9)
        with torch.no_grad():
            for part in cuts:
                model(images[part], visible[part], num_visible, weights_B=weights[part])
        settle_statistics(group_norms(model))
        return {name: value for name, value in model.state_dict().items() if "running" in name or "num_" in name}

    whole = after([slice(0, 9)], torch.ones(9))
    fresh = build(case).state_dict()
    assert all((value != fresh[name]).any() for name, value in whole.items())
    cut = after([slice(0, 3), slice(3, 9)], torch.ones(9))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value)
    repeated = torch.tensor([1.0] * 6 + [0.0] * 3)  # a last group that only fills up
    without, only_two = after([slice(0, 9)], repeated), after([slice(0, 6)], torch.ones(6))
    for name, value in only_two.items():
        torch.testing.assert_close(without[name], value)


def test_a_batch_that_does_not_count_leaves_nothing_behind():
    model = build("ResNet-50, block")
    model(*batch(model))
    drop_statistics(group_norms(model))
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    settle_statistics(group_norms(model))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_where_a_model_is_placed_does_not_change_what_it_computes(case):
    computed = []
    plain, placed, as_on_a_gpu = (build(case) for _ in range(3))
    placed.place(torch.device("cpu"))
    as_on_a_gpu.to(memory_format=as_on_a_gpu.gpu_format)
    for model in (plain, placed, as_on_a_gpu):
        images, visible, num_visible = batch(model)
        with torch.no_grad():
            in_training = model(images, visible, num_visible)
        # In float64: rounding, which differs, is blown up on its way through many layers.
        pred = model.eval().double()(images.double(), visible, num_visible)
        pred.square().mean().backward()
        computed.append([in_training, pred.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for expected, *others in zip(*computed, strict=True):
        wide = expected.dtype == torch.float64
        for other in others:
            limit = (1e-9 if wide else 1e-4) * float(expected.abs().max()) + 1e-12
            torch.testing.assert_close(other, expected, rtol=1e-6 if wide else 1e-3, atol=limit)


def test_the_seed_makes_the_weights(case):
    first, same, other = build(case, 0).state_dict(), build(case, 0).state_dict(), build(case, 1).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_saved_weights_give_the_same_bits(case, tmp_path):
    model, fresh = build(case, 0).eval(), build(case, 1).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    given = batch(model)
    with torch.no_grad():
        assert torch.equal(model(*given), fresh(*given))


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize(("patch", "channels", "width"), [(2, 3, 192), (4, 3, 64), (4, 1, 192), (8, 3, 512)])
def test_the_loss_at_step_0_is_the_one_that_the_initialisation_promises(patch, channels, width, attention):
    """(P-1)/P + 2D/(D+P) under norm_pix within 10 %, on white noise (no cell of it is flat), mean of 40 seeds.

    One seed of a small head is not enough: the tokens have much in common, so few of its rows decide.
    """
    decoder = VitDecoder(width=width, depth=1, heads=4, attention=attention)
    config = VitConfig(patch=patch, width=64, depth=1, heads=2, decoder=decoder)
    losses = []
    for seed in range(40):
        torch.manual_seed(seed)
        model = build_model(config, (4 * patch, 4 * patch), channels)
        images, visible, num_visible = batch(model, num_images=32)
        with torch.no_grad():
            pred = model(images, visible, num_visible)
            losses.append(Objective(ObjectiveConfig(norm_pix=True), model.cell_HW)(images, pred, ~visible).mean())
    P = model.cell_pixels
    assert torch.stack(losses).mean().item() == pytest.approx((P - 1) / P + 2 * width / (width + P), rel=0.1)


@pytest.mark.parametrize("case", [c for c, (config, *_) in CASES.items() if isinstance(config, SparseConvConfig)])
def test_the_loss_at_step_0_of_a_head_that_starts_near_zero_is_1(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    with torch.no_grad():
        loss = Objective(ObjectiveConfig(), model.cell_HW)(images, model(images, visible, num_visible), ~visible)
    assert loss.mean().item() == pytest.approx(1, rel=0.1)


def test_nothing_waits_for_the_device(case):
    """Tensors without values: whatever would have to look at one raises. Shapes are known to the host."""
    model = build(case).to("meta")
    images, visible, num_visible = (t.to("meta") if torch.is_tensor(t) else t for t in batch(model))
    pred = model(images, visible, num_visible)
    loss = Objective(ObjectiveConfig(), model.cell_HW)(images, pred, ~visible)
    assert loss.shape == (6,)
    loss.mean().backward()


def test_compiles_in_place_as_one_graph(case):
    torch._dynamo.reset()  # it counts the graphs of all cases together
    model = build(case).eval()
    given, names = batch(model), list(model.state_dict())
    with torch.no_grad():
        eager = model(*given)
        model.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(*given), eager)
    assert list(model.state_dict()) == names


def test_bf16_autocast_keeps_the_loss_in_fp32(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    objective = Objective(ObjectiveConfig(norm_pix=False), model.cell_HW)
    with torch.no_grad():
        full = objective(images, model(images, visible, num_visible), ~visible)
        with torch.autocast("cpu", torch.bfloat16):
            pred = model(images, visible, num_visible)
            loss = objective(images, pred, ~visible)
    assert pred.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0)


@pytest.mark.parametrize("case", [c for c, (config, *_) in CASES.items() if isinstance(config, VitConfig)])
def test_recomputed_activations_give_the_same_gradients(case):
    gradients = []
    for remembers in (True, False):
        model = build(case)
        model.remembers_activations = remembers
        images, visible, num_visible = batch(model)
        model(images, visible, num_visible).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(CASES[c][0], VitConfig | TimmVitConfig)])
def test_transformers_paint_targets_alone(case):
    model = build(case)
    images, visible, num_visible = batch(model)
    key = {"seed": 1, "pass_": 0, "rows": torch.arange(6), "view": 0, "xp": torch}
    target = masking.draw_target(visible, 4, **key)
    with torch.no_grad():
        whole, part = model(images, visible, num_visible), model(images, visible, num_visible, target, 4)
    torch.testing.assert_close(part[target.flatten(1)], whole[target.flatten(1)])
    assert not part[~target.flatten(1)].any()

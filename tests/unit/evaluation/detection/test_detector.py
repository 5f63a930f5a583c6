"""Torchvision's detector stands where the pyramid says, on the encoder's own normalisation."""

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from maskray.evaluation.detection.detector import build_detector

from .conftest import MODELS, encoder_of


@pytest.fixture(params=["vit", "vit of patch 14", "ResNet"])
def detector(request, small):
    side = 112 if "14" in request.param else 96  # a level has an odd number of places
    return build_detector(encoder_of(request.param, 56 if "14" in request.param else 64), 3, small(image_size=side), 0)


def side_of(detector):
    return detector.transform.max_size


def test_anchors_stand_at_the_places_of_their_level(detector):
    strides, side = detector.backbone.strides, side_of(detector)
    images = ImageList(torch.zeros(1, 3, side, side), [(side, side)])
    maps = [torch.zeros(1, 1, -(-side // stride), -(-side // stride)) for stride in strides]
    (anchors,) = detector.rpn.anchor_generator(images, maps)
    at = 0
    for level, stride in zip(maps, strides, strict=True):
        places = level.shape[-1]
        of_level = anchors[at : at + 3 * places**2].unflatten(0, (places, places, 3))
        centres = (of_level[..., :2] + of_level[..., 2:]) / 2
        assert (centres[:, :, 1, 0] == stride * torch.arange(places)).all()
        assert (centres[:, :, 1, 1] == stride * torch.arange(places)[:, None]).all()
        square = of_level[0, 0, 1]
        assert (square[2:] - square[:2]).tolist() == [8 * stride, 8 * stride]
        at += 3 * places**2
    assert at == len(anchors)


@pytest.mark.parametrize("size", [(128, 128), (40, 128), (128, 40)])
def test_boxes_are_pooled_from_where_they_are_whatever_shape_the_first_image_has(small, size):
    """Left to itself torchvision takes the scales from the first batch, before it is padded."""
    detector = build_detector(encoder_of("vit"), 3, small(image_size=128), 0)
    pool, strides = detector.roi_heads.box_roi_pool, detector.backbone.strides
    # Each place of each level holds where torchvision takes it to be, in pixels from the left (so do its anchors).
    levels = {
        str(i): (stride * torch.arange(-(-128 // stride)).float()).expand(1, 1, -(-128 // stride), -1)
        for i, stride in enumerate(strides)
    }
    for width in (16, 40, 80, 120):
        box = torch.tensor([[4.0, 4.0, 4.0 + width, 4.0 + width]])
        pooled = pool(levels, [box], [size])[0, 0]
        assert pooled.mean() == pytest.approx(4 + width / 2, abs=0.2)


def test_levels_are_those_of_the_sizes_of_boxes(small):
    detector = build_detector(encoder_of("vit"), 3, small(image_size=128), 0)
    mapper = detector.roi_heads.box_roi_pool.map_levels
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in (10, 111, 112, 223, 224, 447, 448, 2000)])
    assert mapper([boxes]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # 224 pixels: stride 16 (Lin et al. 2017)


def test_images_are_normalised_as_the_encoder_knows_them_and_padded_to_the_square(small):
    encoder = encoder_of("vit")
    detector = build_detector(encoder, 3, small(image_size=64), 0)
    wide = torch.full((3, 20, 64), 51, dtype=torch.uint8)
    images, targets = detector.transform([wide, torch.zeros(3, 64, 30, dtype=torch.uint8)])
    assert images.tensors.shape == (2, 3, 64, 64)
    assert torch.allclose(images.tensors[0, :, :20], torch.tensor((51 / 255 - 0.4) / 0.25))
    assert not images.tensors[0, :, 20:].any()
    assert images.image_sizes == [(20, 64), (64, 30)]
    assert targets is None


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_it_learns_and_finds(small, kind, masks):
    side = 112 if "14" in kind else 64
    detector = build_detector(encoder_of(kind, 56 if "14" in kind else 64), 3, small(image_size=side, masks=masks), 0)
    images = [torch.zeros(3, side, side, dtype=torch.uint8), torch.zeros(3, 30, side, dtype=torch.uint8)]
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 30, 28]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    for image, target in zip(images, targets, strict=True):
        target["masks"] = torch.ones(len(target["labels"]), *image.shape[1:], dtype=torch.uint8)
    losses = detector.train()(images, targets)
    assert len(losses) == 4 + masks
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.backbone.encoder.parameters() if p.requires_grad)
    with torch.no_grad():
        found = detector.eval()(images)
    assert [("masks" in each) for each in found] == [masks] * 2


def test_boxes_are_fp32_and_on_no_grid_where_the_rest_is_bf16(small):
    """Beyond 256 pixels bf16's numbers are two apart."""
    side = 640
    sizes = {"image_size": side, "masks": True, "proposals": 64}
    detector = build_detector(encoder_of("vit, learnable positions"), 3, small(**sizes), 0).eval()
    detector.roi_heads.score_thresh = 0.0
    seen, anchors = [], []
    detector.rpn.register_forward_hook(lambda _, __, found: seen.extend(found[0]))
    detector.rpn.anchor_generator.register_forward_hook(lambda _, __, found: anchors.extend(found))
    pixels = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = detector([pixels])
    assert {each.dtype for name, each in found.items() if name != "labels"} == {torch.float32}
    assert [each.dtype for each in anchors] == [torch.float32]
    for boxes in (found["boxes"], *seen):
        far = boxes[(boxes > side / 2) & (boxes < side)]  # those at the border were cut off there
        assert boxes.dtype == torch.float32
        assert len(far) > 20
        assert (far != far.bfloat16()).float().mean() > 0.9


def test_what_is_drawn_follows_from_the_seed_and_leaves_the_generator_alone(small, monkeypatch):
    encoder, before = encoder_of("vit"), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("that of the GPU was seeded"))
    one, same, other = (build_detector(encoder, 3, small(), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert not any(name.startswith("backbone.encoder") for name in differ)
    assert any(name.startswith("backbone.pyramid") for name in differ)
    assert any(name.startswith("roi_heads") for name in differ)


def test_blocks_are_left_out_the_more_often_the_deeper_they_are(small):
    encoder = encoder_of("vit")
    detector = build_detector(encoder, 3, small(drop_path=0.2), 0)
    chances = [block.drop_path1.drop_prob for block in detector.backbone.encoder.blocks]
    assert chances == [0, 0.2]
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in encoder.model.blocks)

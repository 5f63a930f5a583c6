import math

import pytest
import torch

from maskray.config.models import VitConfig, VitDecoder
from maskray.models.base import indices
from maskray.models.vit import MaskedAutoencoderViT, position_table

CONFIG = VitConfig(patch=4, width=64, depth=2, heads=4, decoder=VitDecoder(width=32, depth=1, heads=4))


def test_positions_say_the_column_first_and_then_the_row_on_an_oblong_grid():
    width, rows, columns = 16, 2, 3
    table = position_table(width, (rows, columns))
    assert table.shape == (1, 1 + rows * columns, width)
    assert not table[0, 0].any()
    cells = table[0, 1:].reshape(rows, columns, width)
    first, second = cells[..., : width // 2], cells[..., width // 2 :]
    assert torch.equal(first[0], first[1])
    assert torch.equal(second[:, 0], second[:, 2])
    for row in range(rows):
        for column in range(columns):
            expected = [
                f(place / 10000 ** (i / (width // 4)))
                for place in (column, row)
                for f in (math.sin, math.cos)
                for i in range(width // 4)
            ]
            torch.testing.assert_close(cells[row, column], torch.tensor(expected))


def test_every_cell_has_its_own_position():
    cells = position_table(32, (5, 9))[0, 1:]
    distances = torch.cdist(cells, cells).fill_diagonal_(torch.inf)
    assert distances.min() > 0.1


def test_visible_indices_are_those_of_the_raster():
    visible = torch.tensor([[[True, False, True], [False, True, False]], [[False, False, False], [True, True, True]]])
    assert indices(visible, 3).tolist() == [[0, 2, 4], [3, 4, 5]]


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(CONFIG, (16, 16), 3)
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 3 * 4 + 2
    for name, module in linear:
        bound = math.sqrt(6 / (module.in_features + module.out_features))
        assert not module.bias.any(), name
        assert bound * 0.98 < module.weight.abs().max() <= bound, name
        assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    patch = model.patch_embed.proj
    assert patch.weight.abs().max() <= math.sqrt(6 / (48 + 64))
    assert patch.weight.std().item() == pytest.approx(math.sqrt(2 / (48 + 64)), rel=0.05)
    assert patch.bias.abs().max() <= 1 / math.sqrt(48)  # torch's default for a convolution, which the authors keep
    assert patch.bias.any()
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.4)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert all(m.eps == 1e-6 and (m.weight == 1).all() and not m.bias.any() for m in norms)


def test_the_patch_embedding_is_the_convolution_it_is_named_for():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(CONFIG, (8, 12), 3).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    by_convolution = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.patch_embed(model._cells(images)), by_convolution)


def test_learnable_positions_start_from_the_fixed_ones():
    learnable = MaskedAutoencoderViT(CONFIG.model_copy(update={"positions": "learnable"}), (16, 16), 3)
    fixed = MaskedAutoencoderViT(CONFIG, (16, 16), 3)
    for name in ("pos_embed", "decoder_pos_embed"):
        assert torch.equal(getattr(learnable, name), getattr(fixed, name))
        assert getattr(learnable, name).requires_grad
        assert not getattr(fixed, name).requires_grad


def test_images_of_another_size_are_no_images_of_this_model():
    with pytest.raises(AssertionError, match="the model is built for"):
        MaskedAutoencoderViT(CONFIG, (16, 16), 3).encode(torch.zeros(1, 3, 16, 20))

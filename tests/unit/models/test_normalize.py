import pytest
import torch

from maskray.errors import DataError
from maskray.models.normalize import Normalize


def test_symmetric_maps_bytes_to_minus_one_and_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    assert Normalize.from_kind("symmetric", 1)(images).flatten().tolist() == [-1, 1]


def test_dataset_statistics_are_taken_off_channel_by_channel():
    normalize = Normalize.from_kind("dataset", 3, [0.1, 0.2, 0.3], [0.5, 0.25, 0.2])
    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)  # 0.2 in units of 0 to 1
    expected = torch.tensor([0.2, 0.0, -0.5])
    torch.testing.assert_close(normalize(images)[1, :, 0, 0], expected, atol=1e-6, rtol=0)
    assert normalize(images).dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["imagenet", "symmetric", "dataset"])
def test_the_way_back_is_exact_on_bytes(kind, channels):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, channels, 1, 1)
    normalize = Normalize.from_kind(kind, channels, [0.37], [0.21])
    assert torch.equal(normalize.to_bytes(normalize(images)), images)
    assert normalize.to_bytes(torch.full((1, channels, 1, 1), 1e6)).unique().tolist() == [255]


def test_it_leaves_nothing_in_the_state():
    assert Normalize.from_kind("imagenet", 3).state_dict() == {}


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(DataError, match=r"data\.normalize.*3 channels"):
        Normalize.from_kind("dataset", 1, [0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    with pytest.raises(DataError, match=r"data\.normalize: mean and std of ImageNet.*asks for 5.*dataset or symmetric"):
        Normalize.from_kind("imagenet", 5)


def test_any_number_of_channels_has_its_own_statistics():
    normalize = Normalize.from_kind("dataset", 5, [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.25, 0.2, 0.1, 0.05])
    images = torch.full((2, 5, 4, 4), 51, dtype=torch.uint8)  # 0.2 in units of 0 to 1
    expected = torch.tensor([0.2, 0.0, -0.5, -2.0, -6.0])
    torch.testing.assert_close(normalize(images)[1, :, 0, 0], expected, atol=1e-5, rtol=0)
    assert torch.equal(normalize.to_bytes(normalize(images)), images)


def test_a_constant_channel_is_refused():
    with pytest.raises(DataError, match="std is 0"):
        Normalize.from_kind("dataset", 1, [0.5], [0.0])

"""The building blocks of wrappers, with values worked out by hand."""

import pytest
import torch
from torch import Tensor, nn

from ganserve_trainer import wrap
from ganserve_trainer.wrap import ValueRange


@pytest.mark.parametrize(
    ("values", "floats", "grey_levels"),
    [
        # 63.75 and 191.25 are rounded; 127.5 is rounded to the even neighbour; values outside are clipped.
        ("tanh", [-1.2, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0], [0, 0, 64, 128, 191, 255, 255]),
        ("sigmoid", [-0.1, 0.0, 0.5, 1.0, 1.1], [0, 0, 128, 255, 255]),
        ("byte", [-3.0, 0.4, 2.5, 200.6, 300.0], [0, 0, 2, 201, 255]),
    ],
)
def test_values_become_grey_levels(values: ValueRange, floats: list[float], grey_levels: list[int]) -> None:
    made = wrap.to_bytes(torch.tensor(floats), values)
    assert made.dtype == torch.uint8
    assert made.tolist() == grey_levels


def test_images_become_channels_last_and_grey_ones_colour() -> None:
    red, green = torch.full((2, 3), -1.0), torch.full((2, 3), 1.0)
    made = wrap.to_image(torch.stack([red, green, green])[None])
    assert made.shape == (1, 2, 3, 3)
    assert made[0, 1, 2].tolist() == [0, 255, 255]
    assert wrap.grey_to_rgb(made[..., 1:2])[0, 0, 0].tolist() == [255, 255, 255]


def test_latents_become_maps_and_uniform() -> None:
    latent = torch.tensor([[0.0, 0.6744898, -0.6744898, 40.0]])
    assert wrap.as_map(latent).shape == (1, 4, 1, 1)
    # The quartiles of the normal distribution become those of the uniform one.
    assert wrap.uniform(latent)[0].tolist() == pytest.approx([0, 0.5, -0.5, 1], abs=1e-6)


def test_labels_become_one_hot() -> None:
    assert wrap.one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("shape", [(2, 2), (2, 5, 2)])
def test_truncation_moves_w_towards_the_mean(shape: tuple[int, ...]) -> None:
    made = wrap.truncate(torch.tensor([3.0, 5.0]).expand(shape), torch.tensor([1.0, 1.0]), 0.5)
    assert made.shape == shape
    assert made[1, ..., :].flatten()[:2].tolist() == [2, 3]


class Sum(nn.Module):
    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        return latent.sum(1) if label is None else latent.sum(1) + label


def test_a_served_module_takes_a_label_only_if_it_is_given_one() -> None:
    latent, label = torch.ones(2, 3), torch.tensor([4, 5])
    assert wrap.Served(Sum(), lambda g, latent: g(latent))(latent).tolist() == [3, 3]
    assert wrap.Served(Sum(), lambda g, latent, label: g(latent, label))(latent, label).tolist() == [7, 8]

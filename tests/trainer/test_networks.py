import dataclasses
import math

import pytest
import torch
from torch import nn

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.networks.architecture import parameter_count
from ganserve_trainer.networks.augmentation import augment
from ganserve_trainer.networks.discriminator import build_discriminator
from ganserve_trainer.networks.generator import build_generator
from ganserve_trainer.networks.layers import MinibatchDiscrimination, MinibatchStdDev, SelfAttention, growth_after
from ganserve_trainer.settings import AUGMENTATIONS, PRESETS, Settings, from_preset

DIGITS = tuple(str(digit) for digit in range(10))
MNIST = ImageSpec(1, 28, 28, DIGITS)


def tiny(preset: str, **changes: object) -> Settings:
    return from_preset(preset, {"width": 8} | changes)


def test_the_mlp_is_the_one_that_is_documented() -> None:
    settings = PRESETS["mlp"].settings
    generator, discriminator = build_generator(settings, MNIST), build_discriminator(settings, MNIST)
    widths = [layer.out_features for layer in generator.modules() if isinstance(layer, nn.Linear)]
    assert widths == [256, 512, 1024, 784]
    assert [layer.out_features for layer in discriminator.modules() if isinstance(layer, nn.Linear)] == [512, 256, 1]
    assert parameter_count(generator) == 100 * 256 + 256 * 512 + 512 * 1024 + 1024 * 784 + 3 * (256 + 512 + 1024) + 784


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("conditioning", ["none", "label-channels", "projection"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 64])
def test_every_size_depth_and_condition(preset: str, conditioning: str, channels: int, size: int) -> None:
    spec = ImageSpec(channels, size, size, DIGITS[:3])
    condition = {} if conditioning == "none" else {"conditioning": conditioning}
    settings = tiny(preset, conditional=conditioning != "none", image_size=None, **condition)
    label = torch.arange(4) % 3 if settings.conditional else None
    image = build_generator(settings, spec)(torch.randn(4, settings.latent_dim), label)
    assert image.shape == (4, channels, size, size)
    assert image.abs().max() <= 1
    discriminator = build_discriminator(settings, spec)
    assert discriminator(image, label).shape == (4,)
    assert discriminator.features(image, label).dim() == 2


def test_convolutional_generators_start_small_and_halve_their_channels() -> None:
    def shapes(size: int) -> list[tuple[int, int]]:
        generator = build_generator(tiny("dcgan"), ImageSpec(3, size, size, ()))
        return [
            (layer.in_channels, layer.out_channels)
            for layer in generator.modules()
            if isinstance(layer, nn.ConvTranspose2d)
        ]

    assert shapes(28) == [(16, 8), (8, 3)]
    assert shapes(32) == [(32, 16), (16, 8), (8, 3)]
    assert shapes(64) == [(64, 32), (32, 16), (16, 8), (8, 3)]


def test_images_that_are_not_square_work_and_odd_ones_are_refused() -> None:
    spec = ImageSpec(3, 24, 40, ())
    image = build_generator(tiny("dcgan"), spec)(torch.randn(2, 64))
    assert image.shape == (2, 3, 24, 40)
    assert build_discriminator(tiny("dcgan"), spec)(image).shape == (2,)
    with pytest.raises(TrainerError, match=r"multiples of 4; these are 30x30: use --image-size 32"):
        build_generator(tiny("dcgan"), ImageSpec(3, 30, 30, ()))
    assert build_generator(tiny("mlp"), ImageSpec(3, 30, 30, ()))(torch.randn(2, 100)).shape == (2, 3, 30, 30)


def test_a_conditional_network_needs_classes() -> None:
    with pytest.raises(TrainerError, match="needs classes"):
        build_generator(tiny("cdcgan"), ImageSpec(1, 28, 28, ()))


@pytest.mark.parametrize("preset", ["mlp", "cdcgan"])
@pytest.mark.parametrize("conditioning", ["label-channels", "projection"])
def test_the_label_decides_image_and_logit(preset: str, conditioning: str) -> None:
    settings = tiny(preset, conditional=True, conditioning=conditioning)
    generator, discriminator = build_generator(settings, MNIST).eval(), build_discriminator(settings, MNIST).eval()
    latent = torch.randn(1, settings.latent_dim).expand(2, -1)
    one, other = generator(latent, torch.tensor([1, 2]))
    assert not torch.equal(one, other)
    one, other = discriminator(torch.ones(2, 1, 28, 28), torch.tensor([1, 2]))
    assert one != other


def test_the_projection_is_the_features_on_the_label_s_embedding() -> None:
    discriminator = build_discriminator(tiny("cdcgan", conditioning="projection"), MNIST).eval()
    image, label = torch.randn(3, 1, 28, 28), torch.tensor([4, 0, 9])
    features = discriminator.features(image)
    assert discriminator.embedding is not None
    expected = discriminator.head(features)[:, 0] + (features * discriminator.embedding.weight[label]).sum(1)
    assert torch.allclose(discriminator(image, label), expected, atol=1e-6)


def test_spectral_norm_bounds_every_layer() -> None:
    settings = tiny("cdcgan", spectral_norm=True, conditioning="projection", attention=True)
    discriminator = build_discriminator(settings, MNIST)
    image, label = torch.randn(2, 1, 28, 28), torch.tensor([1, 2])
    for _ in range(50):
        discriminator(image, label)
    discriminator.eval()
    layers = [layer for layer in discriminator.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)]
    assert len(layers) == 9
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_dropout_is_the_discriminator_s_alone() -> None:
    settings = tiny("dcgan", dropout=0.4)
    assert [layer.p for layer in build_discriminator(settings, MNIST).modules() if isinstance(layer, nn.Dropout)]
    assert not [layer for layer in build_generator(settings, MNIST).modules() if isinstance(layer, nn.Dropout)]


def test_stddev_is_that_of_the_group() -> None:
    # Groups of two: 1 and 3 are 1 away from their mean, 5 and 5 are 0 away.
    seen = MinibatchStdDev(2)(torch.tensor([[1.0], [3.0], [5.0], [5.0]]))
    assert seen[:, 1].tolist() == pytest.approx([1, 1, 1e-4, 1e-4], abs=1e-3)
    assert seen[:, 0].tolist() == [1, 3, 5, 5]
    assert MinibatchStdDev(2)(torch.randn(4, 3, 5, 5)).shape == (4, 4, 5, 5)


def test_minibatch_discrimination_is_the_nearness_to_the_others_of_the_group() -> None:
    layer = MinibatchDiscrimination(1, group=2, kernels=1, kernel_size=1)
    nn.init.ones_(layer.project.weight)
    # The distance in the first group is 2, in the second 0.
    seen = layer(torch.tensor([[1.0], [3.0], [5.0], [5.0]]))
    assert seen[:, 1].tolist() == pytest.approx([math.exp(-2), math.exp(-2), 1, 1])


@pytest.mark.parametrize("minibatch", ["stddev", "discrimination"])
@pytest.mark.parametrize("preset", ["mlp", "dcgan"])
def test_the_discriminator_sees_that_a_batch_is_all_the_same(preset: str, minibatch: str) -> None:
    discriminator = build_discriminator(tiny(preset, minibatch=minibatch, dropout=0.0), MNIST)
    image = torch.randn(1, 1, 28, 28)
    same = discriminator.features(image.expand(16, -1, -1, -1))
    mixed = discriminator.features(torch.cat([image, torch.randn(15, 1, 28, 28)]))
    assert not torch.allclose(same[0], mixed[0])
    # Two groups in one pass do not see each other.
    both = discriminator.features(torch.cat([image.expand(16, -1, -1, -1), torch.randn(16, 1, 28, 28)]))
    assert torch.allclose(both[:16], same, atol=1e-6)


def test_attention_begins_as_the_identity_and_then_mixes_positions() -> None:
    layer = SelfAttention(16)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), x)
    nn.init.ones_(layer.strength)
    changed = x.clone()
    changed[:, :, 3, 3] += 1
    assert not torch.allclose(layer(changed)[:, :, 0, 0], layer(x)[:, :, 0, 0])


def test_a_progressive_network_grows_by_the_calendar() -> None:
    days = [0, 99, 100, 150, 200, 299, 300, 350, 400, 10_000]
    assert [growth_after(day, 100, 3) for day in days] == pytest.approx([0, 0, 0, 0.5, 1, 1, 1, 1.5, 2, 2])


def test_a_progressive_generator_shows_what_it_has_at_full_size() -> None:
    settings = tiny("pggan", growth_images=100)
    spec = ImageSpec(3, 64, 64, ())
    generator, discriminator = build_generator(settings, spec), build_discriminator(settings, spec)
    latent = torch.randn(4, settings.latent_dim)
    for images_seen, pixel in [(0, 16), (150, 8), (250, 8), (10_000, 1)]:
        generator.grow_to(images_seen)
        discriminator.grow_to(images_seen)
        image = generator(latent)
        assert image.shape == (4, 3, 64, 64)
        coarse = image[:, :, ::pixel, ::pixel].repeat_interleave(pixel, 2).repeat_interleave(pixel, 3)
        assert torch.equal(image, coarse)
        if pixel == 1:
            assert not torch.equal(image[:, :, ::2], image[:, :, 1::2])
        assert discriminator(image).shape == (4,)


def test_fading_is_continuous() -> None:
    settings = tiny("pggan", growth_images=1_000_000)
    generator = build_generator(settings, ImageSpec(3, 64, 64, ()))
    latent = torch.randn(2, settings.latent_dim)
    generator.grow_to(1_000_000)
    before = generator(latent)
    generator.grow_to(1_000_001)
    assert generator.layers.growth > 0
    assert torch.allclose(generator(latent), before, atol=1e-4)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_differs_by_image_and_lets_gradients_through(name: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 16).sub(0.5).expand(64, -1, -1, -1).clone().requires_grad_(True)
    seen = augment(images, (name,))
    assert seen.shape == images.shape
    assert len({row.numpy().tobytes() for row in seen.detach()}) > 16
    seen.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    torch.manual_seed(0)
    torch.rand(1, 3, 16, 16)
    assert torch.equal(augment(images, (name,)), seen)


def test_translation_moves_by_at_most_an_eighth_and_cutout_blanks_a_quarter() -> None:
    torch.manual_seed(0)
    dot = torch.full((256, 1, 16, 16), -1.0)
    dot[:, :, 8, 8] = 1.0
    places = (augment(dot, ("translation",)) == 1).nonzero()[:, 2:]
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in range(6, 11) for x in range(6, 11)}
    white = augment(torch.ones(256, 1, 16, 16), ("cutout",))
    blanked = (white == 0).flatten(1).sum(1)
    assert blanked.max() == 64
    assert blanked.min() >= 16


def test_settings_that_contradict_each_other_are_refused() -> None:
    for changes, message in [
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"width": 1.5}, "width is 1.5; it must be of type int"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"loss": "hinges"}, "choose one of non-saturating"),
        ({"conditional": "yes"}, "must be of type bool"),
        ({"augment": "color+blur"}, "choose from color, translation, cutout"),
        ({"minibatch": "stddev", "batch_size": 30}, "multiple"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "hinge has none"),
        ({"architecture": "mlp", "attention": True}, "attention is for the dcgan"),
        ({"mismatched_labels": 0.5}, "add conditional"),
        ({"architecture": "progressive", "compile": True}, "cannot be compiled"),
        ({"widht": 3}, "did you mean width"),
    ]:
        with pytest.raises(TrainerError, match=message):
            from_preset("dcgan", changes)
    with pytest.raises(TrainerError, match="did you mean cdcgan"):
        from_preset("cdgan", {})
    assert dataclasses.replace(PRESETS["dcgan"].settings, learning_rate=1).learning_rate == 1

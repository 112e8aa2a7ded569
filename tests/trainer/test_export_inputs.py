"""Generators with more inputs than a latent and a label, exported and served: the images are those of torch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import run_server
from torch import Tensor, nn
from torch.nn import functional

from ganserve import Client, latents
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export import Attribute, Attributes, Label, Latent, Truncation, export_module

LATENT_DIM, WIDTH = 16, 8
INPUTS = {
    "latent": Latent((LATENT_DIM,)),
    "style": Latent((LATENT_DIM,)),
    "noise": Latent((1, 8, 8), default_seed=0),
    "label": Label(one_hot=True),
    "attributes": Attributes((Attribute("mix"), Attribute("contrast", 0.5, 2, 1), Attribute("mirrored", binary=True))),
    "truncation": Truncation(),
}


def normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Style(nn.Module):
    """A StyleGAN2 of 8x8 pixels: a mapping network, truncation towards the mean of W, style mixing, and noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mapping = nn.Sequential(nn.Linear(LATENT_DIM, LATENT_DIM), nn.LeakyReLU(0.2), nn.Linear(LATENT_DIM, 16))
        self.classes = nn.Linear(3, LATENT_DIM, bias=False)
        self.constant = nn.Parameter(torch.randn(1, WIDTH, 4, 4))
        self.affine = nn.Linear(16, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3) / 8)
        self.colour = nn.Conv2d(WIDTH, 3, 1)
        with torch.no_grad():
            self.register_buffer("mean", self.mapping(normalised(torch.randn(1000, LATENT_DIM))).mean(0))

    def forward(
        self, latent: Tensor, style: Tensor, noise: Tensor, label: Tensor, attributes: Tensor, truncation: Tensor
    ) -> Tensor:
        mix, contrast, mirrored = (attributes[:, [index]] for index in range(3))
        w, other = (self.mapping(normalised(z + self.classes(label))) for z in (latent, style))
        w = torch.lerp(w, other, mix)
        w = self.mean + (w - self.mean) * truncation.reshape(-1, 1)
        style = self.affine(5 * w) + 1
        x = functional.interpolate(self.constant * style[:, :, None, None], scale_factor=2.0)
        x = functional.conv2d(x, self.weight, padding=1)
        x = x * torch.rsqrt(style.square() @ self.weight.square().sum((2, 3)).T + 1e-8)[:, :, None, None]
        x = self.colour(functional.leaky_relu(x + 0.3 * noise, 0.2)) * contrast[:, :, None, None]
        x = torch.where(mirrored[:, :, None, None] > 0.5, x.flip(3), x)
        return torch.round((torch.tanh(x) + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class Scalar(nn.Module):
    """Takes one truncation for the whole batch, and uniform latents of another shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.grow = nn.ConvTranspose2d(4, 3, 4)

    def forward(self, latent: Tensor, truncation: Tensor) -> Tensor:
        images = torch.sigmoid(4 * self.grow(latent * truncation))
        return torch.round(images * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    models = tmp_path_factory.mktemp("models")
    export_module(Style(), models, "style", inputs=INPUTS, class_names=["ant", "bee", "cat"])
    scalar = {"latent": Latent((4, 1, 1), "uniform"), "truncation": Truncation(scalar=True)}
    export_module(Scalar(), models, "scalar", inputs=scalar)
    with run_server("--workers=1", f"--models={models}") as server, Client(server.address) as connected:
        yield connected


def own(seed: int, label: int, psi: float = 1, style_seed: int | None = None, **attributes: float) -> NDArray[np.uint8]:
    """Make an image as a program of one's own does, with torch."""
    random = np.random.RandomState(seed)
    latent, style = random.standard_normal(LATENT_DIM), random.standard_normal(LATENT_DIM)
    if style_seed is not None:
        style = np.random.RandomState(style_seed).standard_normal(LATENT_DIM)
    given = {
        "latent": latent,
        "style": style,
        "noise": np.random.RandomState(0).standard_normal((1, 8, 8)),
        "label": np.eye(3)[label],
        "attributes": [attributes.get("mix", 0), attributes.get("contrast", 1), attributes.get("mirrored", 0)],
        "truncation": psi,
    }
    with torch.no_grad():
        made = Style().eval()(
            **{name: torch.tensor(np.array([value]), dtype=torch.float32) for name, value in given.items()}
        )
    pixels: NDArray[np.uint8] = made[0].numpy()
    return pixels


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(np.abs(a.astype(int) - b).max())


def test_truncation_in_w_is_that_of_the_own_pipeline(client: Client) -> None:
    model = client.model("style")
    assert (model.truncation, model.latent_dim, model.further_latents) == ("input", LATENT_DIM, ("style", "noise"))
    for psi in (0.7, 0, 1, 1.5):
        made = client.generate("style", seed=42, label="bee", truncation=psi).pixels[0]
        assert difference(made, own(42, 1, psi)) <= 1
    assert difference(own(42, 1, 0.7), own(42, 1)) > 10
    mean = [client.generate("style", seed=seed, label=0, truncation=0).pixels for seed in (1, 4)]
    assert np.array_equal(*mean)


def test_styles_mix_in_w_and_attributes_do_what_the_module_does(client: Client) -> None:
    mixes = [0.0, 0.5, 1.0]
    seeds = {"style": 9}
    walk = client.interpolate("style", 5, 5, 3, label=0, attributes={"mix": mixes}, input_seeds=seeds)
    for mix, made in zip(mixes, walk.pixels, strict=True):
        assert difference(made, own(5, 0, style_seed=9, mix=mix)) <= 1
    assert difference(walk.pixels[0], walk.pixels[2]) > 10
    how = {"contrast": 2, "mirrored": 1, "mix": 0.3}
    batch = client.generate("style", seed=3, label=2, attributes=how)
    assert difference(batch.pixels[0], own(3, 2, **how)) <= 1
    assert np.array_equal(client.reproduce(batch[0].provenance).pixels, batch.pixels)


def test_a_module_may_take_one_truncation_for_a_batch(client: Client) -> None:
    assert client.model("scalar").distribution == "uniform"
    for psi in (1.0, 0.25):
        latent = torch.from_numpy(latents([7], 4, "uniform")).view(1, 4, 1, 1)
        with torch.no_grad():
            wanted = Scalar()(latent, torch.tensor(psi)).numpy()
        assert difference(client.generate("scalar", seed=7, truncation=psi).pixels, wanted) <= 1


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({}, "latent_dim, or all inputs"),
        ({"latent_dim": 4, "inputs": INPUTS}, "latent_dim, or all inputs"),
        ({"inputs": {"z": Latent((4,))}}, "the first input is 'z'; it must be 'latent'"),
        ({"inputs": {"latent": Latent((4,), default_seed=1)}}, "without a default seed"),
        ({"inputs": {"latent": Latent((4,)), "psi": Truncation()}}, "call it 'truncation'"),
        ({"inputs": {"latent": Latent((4,), "cauchy")}}, "uniform, sphere"),
        ({"inputs": {"latent": Latent((4,)), "label": Label()}}, "class_names"),
        (
            {"inputs": {"latent": Latent((4, 1, 1)), "noise": Latent((1,))}},
            r"lacks arguments of the names latent, noise",
        ),
    ],
)
def test_inputs_that_no_server_would_know_are_refused(how: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=text):
        export_module(Scalar(), tmp_path, "mine", **how)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())

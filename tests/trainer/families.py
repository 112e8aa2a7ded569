"""Small random generators of the families that docs/bring-a-generator.md has a recipe for, and their images."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot
from torch.nn.utils.parametrizations import spectral_norm


class Dcgan(nn.Module):
    """Latents [n, nz, 1, 1] to images of 8 pixels."""

    def __init__(self, nz: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *(nn.ConvTranspose2d(nz, 4, 4, 1, 0, bias=False), nn.BatchNorm2d(4), nn.ReLU(True)),
            *(nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), nn.Tanh()),
        )

    def forward(self, input: Tensor) -> Tensor:
        images: Tensor = self.main(input)
        return images


class Dense(nn.Module):
    """Latents, joined to what else there is, to grey images of 8 pixels."""

    def __init__(self, inputs: int, outputs: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers(x)).reshape(-1, 1, 8, 8)


class Acgan(Dense):
    """The latent is multiplied by an embedding of the label."""

    def __init__(self, latent_dim: int = 100, classes: int = 10) -> None:
        super().__init__(latent_dim)
        self.label_emb = nn.Embedding(classes, latent_dim)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.label_emb(labels) * noise)


class Biggan(nn.Module):
    """A part of the latent for each block; conditional BatchNorm by the shared embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(3, 8)
        self.linear = nn.Linear(60, 4 * 16)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.gain = spectral_norm(nn.Linear(60 + 8, 4))
        self.image = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        first, second = torch.split(z, 60, 1)
        x = self.norm(self.linear(first).view(z.size(0), 4, 4, 4))
        x = x * (1 + self.gain(torch.cat([second, y], 1))).view(z.size(0), -1, 1, 1)
        return torch.tanh(self.image(interpolate(torch.relu(x), scale_factor=2)))


class Progan(nn.Module):
    """PixelNorm, and a blend of two resolutions; the images are not limited."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(512, 4 * 16)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.images = nn.ModuleList([nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)])

    def forward(self, z: Tensor, step: int, alpha: float) -> Tensor:
        x = self.dense(z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()).reshape(-1, 4, 4, 4)
        before = x
        for block in self.blocks[: step + 1]:
            before, x = x, block(interpolate(x, scale_factor=2) if block is self.blocks[1] else x)
            x = nn.functional.leaky_relu(x, 0.2)
            x = x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()
        image: Tensor = self.images[step](x)
        if alpha < 1:
            image = alpha * image + (1 - alpha) * interpolate(self.images[0](before), scale_factor=2)
        return image


class _Mapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(512, 8)
        self.register_buffer("w_avg", torch.linspace(-1, 1, 8))

    def forward(self, z: Tensor, c: Tensor | None) -> Tensor:
        assert c is None
        z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        return nn.functional.leaky_relu(self.layer(z), 0.2).unsqueeze(1).repeat(1, 2, 1)


class _Synthesis(nn.Module):
    """Two layers by modulated convolutions, with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(4, 8, 8))
        self.styles = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
        self.weights = nn.ParameterList([torch.randn(4, 4, 3, 3), torch.randn(3, 4, 1, 1)])
        self.register_buffer("noise", torch.randn(8, 8))

    def forward(self, ws: Tensor, noise_mode: str = "random", fused_modconv: bool = True) -> Tensor:
        x = self.constant.unsqueeze(0).repeat(ws.shape[0], 1, 1, 1)
        noise = self.noise if noise_mode == "const" else torch.randn(ws.shape[0], 1, 8, 8)
        x = nn.functional.leaky_relu(self._modulated(x, ws[:, 0], 0, fused_modconv) + 0.1 * noise, 0.2)
        return self._modulated(x, ws[:, 1], 1, fused_modconv) / 3

    def _modulated(self, x: Tensor, w: Tensor, index: int, fused: bool) -> Tensor:
        style, weights = self.styles[index](w), self.weights[index]
        each = weights[None] * style[:, None, :, None, None]
        scale = (each.square().sum((2, 3, 4)) + 1e-8).rsqrt()
        if not fused:
            x = nn.functional.conv2d(x * style[:, :, None, None], weights, padding="same")
            return x * scale[:, :, None, None]
        n, _, height, width = x.shape
        each = (each * scale[:, :, None, None, None]).reshape(-1, *weights.shape[1:])
        x = nn.functional.conv2d(x.reshape(1, -1, height, width), each, padding="same", groups=n)
        return x.reshape(n, -1, height, width)


class Stylegan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mapping = _Mapping()
        self.synthesis = _Synthesis()


class R3gan(Dense):
    """Takes one-hot labels."""

    def __init__(self) -> None:
        super().__init__(64 + 4)
        self.embedding = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, self.embedding(c)], 1))


class Sngan(nn.Module):
    """A residual block with spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Linear(128, 4 * 16))
        self.norm, self.conv = nn.BatchNorm2d(4), spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.image = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(x.shape[0], 4, 4, 4)
        up = interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.tanh(self.image(up + self.conv(interpolate(torch.relu(self.norm(x)), scale_factor=2))))


class LightweightGan(nn.Module):
    """Gated units, PixelShuffle, and excitation of later layers by earlier ones; images from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.initial = nn.Sequential(nn.ConvTranspose2d(256, 8, 4), nn.BatchNorm2d(8), nn.GLU(dim=1))
        self.up = nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2), nn.SiLU())
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.normalize(self.initial(x[:, :, None, None]), dim=1)
        images: Tensor = self.out(self.up(x) * self.excite(x)) + 0.5
        return images


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc3, self.fc4 = nn.Linear(20, 8), nn.Linear(8, 784)

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc4(torch.relu(self.fc3(z))))


def _tanh(images: Tensor) -> Tensor:
    return (images + 1) * 127.5


def _normal(z: Tensor) -> Tensor:
    """Return uniform values, by the distribution function of the normal distribution."""
    return 2 * torch.special.ndtr(z) - 1


def _stylegan(g: Any, z: Tensor, y: Tensor) -> Tensor:
    w = g.mapping(z, None)
    return _tanh(g.synthesis(0.3 * g.mapping.w_avg + 0.7 * w, noise_mode="const"))


# By the recipe's title: the generator, and its grey levels, [n, channels, height, width], from latents and labels.
FAMILIES: dict[str, tuple[Any, Any]] = {
    "DCGAN": (lambda: Dcgan(100), lambda g, z, y: _tanh(g(z.reshape(-1, 100, 1, 1)))),
    "cGAN": (
        lambda: Dense(72),
        lambda g, z, y: _tanh(g(torch.cat([_normal(z), one_hot(y, 10).float()], 1))),
    ),
    "InfoGAN": (
        lambda: Dense(74),
        lambda g, z, y: _tanh(g(torch.cat([z[:, :62], one_hot(y, 10).float(), _normal(z[:, 62:])], 1))),
    ),
    "ACGAN": (Acgan, lambda g, z, y: _tanh(g(z, y))),
    "BigGAN": (Biggan, lambda g, z, y: _tanh(g(z, g.shared(y)))),
    "ProGAN": (Progan, lambda g, z, y: _tanh(g(z, 1, 1.0))),
    "StyleGAN2 and StyleGAN3": (Stylegan, _stylegan),
    "R3GAN": (R3gan, lambda g, z, y: _tanh(g(z, one_hot(y, 3).float()))),
    "SNGAN": (Sngan, lambda g, z, y: _tanh(g(z))),
    "lightweight-gan": (LightweightGan, lambda g, z, y: g(z) * 255),
    "VAE decoders": (Vae, lambda g, z, y: g.decode(z).reshape(-1, 1, 28, 28) * 255),
}

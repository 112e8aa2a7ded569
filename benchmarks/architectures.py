"""Small generators with random weights, one for each construct that generators are built of, for `determinism.py`.

Each makes 16x16 pixels from a latent of 32 numbers, and from one of 4 classes if its forward takes a label.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ganserve_trainer.export import export_module

LATENT_DIM, CLASSES, WIDTH = 32, 4, 24


class PixelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Start(nn.Module):
    """A dense layer to `width` maps of 4x4."""

    def __init__(self, width: int = WIDTH, inputs: int = LATENT_DIM) -> None:
        super().__init__()
        self.dense, self.width = nn.Linear(inputs, width * 16), width

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x).view(-1, self.width, 4, 4)


def up(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def progressive() -> nn.Module:
    def conv(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.2), PixelNorm()]

    grow = [nn.Upsample(scale_factor=2.0, mode="nearest"), *conv(WIDTH, WIDTH), *conv(WIDTH, WIDTH)]
    return nn.Sequential(
        PixelNorm(), Start(), PixelNorm(), *grow, nn.Upsample(scale_factor=2.0), nn.Conv2d(WIDTH, 3, 1)
    )


class Attention(nn.Module):
    """Self-attention over pixels, as in SAGAN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(width, size, 1) for size in (width // 8, width // 8, width))
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).flatten(2) for part in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, 2)
        return x + self.gain * (value @ weights.transpose(1, 2)).view(x.shape)


def self_attention() -> nn.Module:
    grow = [nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(), Attention(WIDTH)]
    return nn.Sequential(Start(), *grow, nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1))


class Modulated(nn.Module):
    """StyleGAN2's convolution, by scaling its input and its output."""

    def __init__(self, outputs: int, *, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, WIDTH, 3, 3) / (3 * WIDTH**0.5))
        self.style, self.demodulate = nn.Linear(LATENT_DIM, WIDTH), demodulate
        self.noise = nn.Parameter(torch.randn(1, 1, 1, 1) * 0.1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.style(w) + 1
        x = functional.conv2d(x * style[:, :, None, None], self.weight, padding=1)
        if self.demodulate:
            scale = torch.rsqrt((style.square() @ self.weight.square().sum((2, 3)).T) + 1e-8)
            x = x * scale[:, :, None, None]
        return functional.leaky_relu(x + self.noise, 0.2)


class Style(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [part for _ in range(3) for part in (nn.Linear(LATENT_DIM, LATENT_DIM), nn.LeakyReLU(0.2))]
        self.mapping = nn.Sequential(PixelNorm(), *layers)
        self.constant = nn.Parameter(torch.randn(1, WIDTH, 4, 4))
        self.first, self.second = Modulated(WIDTH), Modulated(WIDTH)
        self.colours = nn.ModuleList(Modulated(3, demodulate=False) for _ in range(2))

    def forward(self, latent: Tensor) -> Tensor:
        w = self.mapping(latent)
        x = self.first(up(self.constant.expand(latent.shape[0], -1, -1, -1)), w)
        colour = self.colours[0](x, w)
        return functional.interpolate(colour, scale_factor=2.0, mode="bilinear", align_corners=False) + self.colours[1](
            self.second(up(x), w), w
        )


class ConditionalNorm(nn.Module):
    """BigGAN's BatchNorm, with gain and bias from the class and the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH, affine=False)
        self.gain, self.bias = (nn.Linear(LATENT_DIM, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = (part(condition)[:, :, None, None] for part in (self.gain, self.bias))
        return functional.relu(self.norm(x) * (1 + gain) + bias)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.start = nn.Embedding(CLASSES, LATENT_DIM), Start()
        self.norms = nn.ModuleList(ConditionalNorm() for _ in range(2))
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.colour = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        condition, x = latent + self.embedding(label), self.start(latent)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = up(x) + layer(up(norm(x, condition)))
        return self.colour(x)


class Concatenated(nn.Module):
    """The class as an embedding beside the latent, as in conditional DCGANs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.start = nn.Embedding(CLASSES, 8), Start(inputs=LATENT_DIM + 8)
        self.grow = nn.Sequential(
            nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1), nn.ELU(),
            nn.ConvTranspose2d(WIDTH, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        return self.grow(self.start(torch.cat([latent, self.embedding(label)], 1)))


def grouped() -> nn.Module:
    """R3GAN's residual blocks: pointwise and grouped convolutions."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(WIDTH, 2 * WIDTH, 1, bias=False), nn.LeakyReLU(0.2),
                nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1, groups=6), nn.LeakyReLU(0.2),
                nn.Conv2d(2 * WIDTH, WIDTH, 1, bias=False),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x)

    bigger = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
    return nn.Sequential(Start(), Block(), bigger, Block(), bigger, Block(), nn.Conv2d(WIDTH, 3, 1))


def spectral() -> nn.Module:
    def conv(outputs: int) -> nn.Module:
        return nn.utils.spectral_norm(nn.Conv2d(WIDTH, outputs, 3, padding=1))

    bigger = nn.Upsample(scale_factor=2.0)
    return nn.Sequential(Start(), bigger, conv(WIDTH), nn.ReLU(), bigger, conv(WIDTH), nn.Softplus(), conv(3))


class Excitation(nn.Module):
    """lightweight-gan: gated units, and skip-layer excitation of large maps by small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.start = Start()
        self.first, self.second = (nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1) for _ in range(2))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Conv2d(WIDTH, WIDTH, 4), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 1)
        )
        self.colour = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        small = self.start(latent)
        x = functional.glu(self.first(up(small)), 1)
        x = functional.glu(self.second(up(x)), 1) * torch.sigmoid(self.gate(small))
        return self.colour(x)


class Decoder(nn.Module):
    """The decoder of a VAE: GroupNorm and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Start(), nn.GroupNorm(4, WIDTH), nn.SiLU(), nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1),
            nn.GroupNorm(4, WIDTH), nn.SiLU(), nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


class Normalised(nn.Module):
    """An encoder and decoder with InstanceNorm and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm = Start(), nn.InstanceNorm2d(WIDTH, affine=True)
        self.down, self.back = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, 2, 1)
        self.colour = nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1)

    def forward(self, latent: Tensor) -> Tensor:
        x = up(self.start(latent))
        small = functional.relu(self.norm(self.down(x)))
        return self.colour(functional.relu(self.norm(self.back(torch.cat([small, small.flip(3)], 1)))) + x)[
            :, :, ::2, ::2
        ]


class Transformer(nn.Module):
    """Tokens, LayerNorm, multi-head attention and GELU, then pixel shuffle, as in TransGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.place = Start(32), nn.Parameter(torch.randn(1, 16, 32) * 0.1)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.mix, self.out = nn.Linear(32, 96), nn.Linear(32, 48)
        self.dense = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, latent: Tensor) -> Tensor:
        x = self.start(latent).flatten(2).transpose(1, 2) + self.place
        parts = self.mix(self.norms[0](x)).view(-1, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + mixed.transpose(1, 2).reshape(-1, 16, 32)
        x = self.out(x + self.dense(self.norms[1](x)))
        return functional.pixel_shuffle(x.transpose(1, 2).reshape(-1, 48, 4, 4), 4)


class Implicit(nn.Module):
    """Sines of coordinates, whose frequencies and colours the latent sets, as in StyleGAN3's input and INR-GAN."""

    def __init__(self) -> None:
        super().__init__()
        places = torch.linspace(-1, 1, 16)
        self.register_buffer("grid", torch.stack(torch.meshgrid(places, places, indexing="ij"), -1).view(1, 256, 2))
        self.frequency, self.phase = nn.Linear(LATENT_DIM, 2 * WIDTH), nn.Linear(LATENT_DIM, WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus(), nn.Linear(WIDTH, 3))

    def forward(self, latent: Tensor) -> Tensor:
        waves = self.grid @ (3 * self.frequency(latent)).view(-1, 2, WIDTH) + self.phase(latent)[:, None]
        return self.layers(torch.sin(waves)).transpose(1, 2).reshape(-1, 3, 16, 16)


def dense() -> nn.Module:
    layers = [
        part for _ in range(2) for part in (nn.Linear(LATENT_DIM, LATENT_DIM), nn.LayerNorm(LATENT_DIM), nn.ELU())
    ]
    return nn.Sequential(*layers, nn.Linear(LATENT_DIM, 256), nn.Unflatten(1, (1, 16, 16)))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "attention": self_attention,
    "concatenated-label": Concatenated,
    "conditional-norm": Conditional,
    "decoder": Decoder,
    "dense": dense,
    "excitation": Excitation,
    "grouped": grouped,
    "implicit": Implicit,
    "instance-norm": Normalised,
    "progressive": progressive,
    "spectral-norm": spectral,
    "style": Style,
    "transformer": Transformer,
}


class Bytes(nn.Module):
    """Makes grey levels of what a generator makes, channels last."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.generator(latent) if label is None else self.generator(latent, label)
        return torch.round((torch.tanh(x) + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def publish(repository: Path) -> None:
    """Write a version of each model to a repository."""
    for name, make in ARCHITECTURES.items():
        torch.manual_seed(0)
        module = make()
        module.train()
        takes_label = "label" in inspect.signature(module.forward).parameters
        with torch.no_grad():
            for _ in range(3):  # so that BatchNorm has statistics of its own
                latent, label = torch.randn(64, LATENT_DIM), torch.arange(64) % CLASSES
                module(latent, label) if takes_label else module(latent)
        names = [str(label) for label in range(CLASSES)] if takes_label else []
        export_module(Bytes(module), repository, name, latent_dim=LATENT_DIM, class_names=names)

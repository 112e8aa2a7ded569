"""The networks whose features can be compared besides the judge's: Inception-v3, CLIP, or a network in a file.

A feature network maps images, uint8 [n, channels, height, width], to features, float32 [n, d]. `kept_features` caches
features on disk, in parts, so that nothing is computed twice, and a killed evaluation resumes.
"""

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import cache
from ganserve_trainer.evaluation.progress import Report
from ganserve_trainer.model_file import load_session
from ganserve_trainer.train.devices import best_device

JUDGE, INCEPTION, CLIP, CUSTOM = "judge", "inception", "clip", "custom"

_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
_CLIP_URL = (
    "https://openaipublic.azureedge.net/clip/models/"
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt"
)
_AT_ONCE = 50
_PART = 5000  # images whose features are in one file of the cache


class FeatureNetwork(Protocol):
    """What computes features."""

    def features(self, images: Tensor) -> Tensor:
        """Return the features of images, uint8 [n, channels, height, width]: float32 [n, d]."""

    def digest(self) -> str:
        """Return the SHA-256 that identifies the network."""


@dataclass(frozen=True, slots=True)
class FileNetwork:
    """A network whose weights are in a file. `classify` maps features to logits, for the Inception Score."""

    kind: str  # INCEPTION, CLIP or CUSTOM
    described: str
    compute: Callable[[Tensor], Tensor]
    sha256: str
    classify: Callable[[Tensor], Tensor] | None = None

    def features(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Raises:
            TrainerError: the network does not take such images, or returns something else than [n, d].
        """
        parts: list[Tensor] = []
        for part in images.split(_AT_ONCE):
            try:
                with torch.no_grad():
                    found = self.compute(part.contiguous())
            except Exception as error:  # torch and onnxruntime raise anything
                raise TrainerError(
                    f"the features of {self.described} cannot be computed for uint8 images {list(part.shape)}: {error}"
                ) from error
            if found.ndim != 2 or len(found) != len(part):
                raise TrainerError(
                    f"{self.described} returns {list(found.shape)} for {len(part)} images; it must return "
                    f"[{len(part)}, number of features]"
                )
            parts.append(found.float().cpu())
        return torch.cat(parts)

    def digest(self) -> str:
        """Return the SHA-256 of the file."""
        return f"sha256:{self.sha256}"


def feature_networks(names: Sequence[str]) -> list[FileNetwork]:
    """Open the feature networks of `--features`, except for the judge.

    Args:
        names: "judge", "inception=FILE" or "clip=FILE" with the file of the weights, or the path of a network: a
            TorchScript module, an exported program (.pt2) or an ONNX file that maps uint8 [n, channels, height, width]
            to float [n, d].

    Raises:
        TrainerError: a name is unknown, or a file or a package is missing, or the file cannot be read.
    """
    networks = []
    for name in names:
        kind, _, file = name.partition("=")
        if kind == JUDGE and not file:
            continue
        if kind == INCEPTION:
            networks.append(_inception(_weights(kind, file, _INCEPTION_URL)))
        elif kind == CLIP:
            networks.append(_clip(_weights(kind, file, _CLIP_URL)))
        elif Path(name).is_file():
            networks.append(_custom(Path(name)))
        else:
            raise TrainerError(
                f"--features {name}: there is no such file; give judge, inception=FILE, clip=FILE, or the path of a "
                "network (TorchScript, .pt2 or .onnx) that maps uint8 images [n, channels, height, width] to [n, d]"
            )
    kinds = [network.kind for network in networks]
    if len(set(kinds)) < len(kinds):
        raise TrainerError("--features is given twice with the same kind of network; evaluate them one by one")
    return networks


def kept_features(
    network: FeatureNetwork,
    images: Callable[[int, int], Tensor],
    count: int,
    kept: Path | None,
    report: Report,
    stage: str,
) -> Tensor:
    """Return the features of `count` images, float32 [count, d], from the cache as far as it has them.

    Args:
        network: what computes them.
        images: returns the images from one number up to another, uint8 [n, channels, height, width].
        count: the number of images.
        kept: the folder of the features of exactly these images; None caches nothing.
        report: called with `stage` and the progress, unless the cache has all.
        stage: what is being done.
    """
    parts: list[Tensor] = []
    for start in range(0, count, _PART):
        end = min(start + _PART, count)
        path = kept and kept / f"{network.digest().removeprefix('sha256:')[:32]}-{start}-{end}"
        part = cache.load(path)
        if part is None:
            if not parts:
                report(stage)
            part = network.features(images(start, end))
            cache.store(path, part)
            report(stage, end / count)
        parts.append(part)
    return torch.cat(parts)


def _weights(kind: str, file: str, url: str) -> Path:
    if not file or not Path(file).is_file():
        missing = f"{file} is missing" if file else "no file is given"
        raise TrainerError(
            f"--features {kind} needs the network's weights, and {missing}: download {url} and give its path, "
            f"--features {kind}=FILE"
        )
    return Path(file)


def _fidelity(module: str, name: str) -> Any:
    try:
        return getattr(__import__(f"torch_fidelity.{module}", fromlist=[name]), name)
    except ModuleNotFoundError as error:
        raise TrainerError(
            f"{error.name} is not installed, which these features need; install ganserve with its extra: "
            "'ganserve[features]'"
        ) from error


def _inception(path: Path) -> FileNetwork:
    extractor = _fidelity("feature_extractor_inceptionv3", "FeatureExtractorInceptionV3")
    try:
        # First with weights only: torch-fidelity's reader would run code in the file.
        torch.load(path, map_location="cpu", weights_only=True)
        network = extractor("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # zip's, pickle's and torch's readers raise anything
        raise TrainerError(
            f"{path} does not have torch-fidelity's weights of Inception-v3 ({type(error).__name__}); they are at "
            f"{_INCEPTION_URL}"
        ) from error
    network = network.to(best_device())
    # The published Inception Scores leave out the bias of the last layer (torch-fidelity's "logits_unbiased").
    head = network.fc.weight.detach().cpu()
    return FileNetwork(
        INCEPTION,
        "Inception-v3, its 2,048 pooled features by torch-fidelity",
        _in_colour(network),
        _sha256(path),
        lambda features: features @ head.T,
    )


def _clip(path: Path) -> FileNetwork:
    extractor = _fidelity("feature_extractor_clip", "FeatureExtractorCLIP")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            network = extractor("clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(path))
    except Exception as error:  # torch raises anything
        raise TrainerError(
            f"{path} does not have OpenAI's weights of CLIP ({type(error).__name__}); those of ViT-B/32 are at "
            f"{_CLIP_URL}"
        ) from error
    network = network.to(best_device()).eval()
    return FileNetwork(CLIP, "CLIP, its image features by torch-fidelity", _in_colour(network), _sha256(path))


def _in_colour(network: Any) -> Callable[[Tensor], Tensor]:
    def compute(images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"it takes images of 1 or 3 channels, not {images.shape[1]}")
        features: Tensor = network(images.expand(-1, 3, -1, -1).contiguous().to(best_device()))[0]
        return features

    return compute


def _custom(path: Path) -> FileNetwork:
    described = f"the network of {path.name}"
    try:
        compute = _onnx(path) if path.suffix == ".onnx" else _torch_module(path)
    except Exception as error:  # torch and onnxruntime raise anything
        raise TrainerError(
            f"{path} cannot be read as a TorchScript module, an exported program (.pt2) or an ONNX file: {error}"
        ) from error
    return FileNetwork(CUSTOM, described, compute, _sha256(path))


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    session = load_session(str(path), quiet=True)
    (wanted,) = session.get_inputs()

    def compute(images: Tensor) -> Tensor:
        pixels = images.numpy() if "uint8" in wanted.type else images.numpy().astype(np.float32)
        return torch.from_numpy(session.run(None, {wanted.name: pixels})[0])

    return compute


def _torch_module(path: Path) -> Callable[[Tensor], Tensor]:
    with zipfile.ZipFile(path) as archive:
        script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        network: Any = torch.jit.load(path) if script else torch.export.load(path).module()
    if script:
        network.eval()
    network = network.to(best_device())

    def compute(images: Tensor) -> Tensor:
        features: Tensor = network(images.to(best_device()))
        return features

    return compute


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

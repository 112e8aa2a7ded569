import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.cli import main
from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import judge as judge_module
from ganserve_trainer.evaluation import measure as measure_module
from ganserve_trainer.evaluation.features import FileNetwork, feature_networks
from ganserve_trainer.evaluation.measure import measure

IMAGES = torch.randint(256, (5, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()


class Own(nn.Module):
    """A user's own network: the mean of each row of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(3).flatten(1) / 255


def file_of(kind: str, folder: Path) -> Path:
    path = folder / f"own.{kind}"
    batch = {"images": {0: torch.export.Dim("n", min=1, max=1000)}}
    if kind == "pt":
        torch.jit.script(Own()).save(str(path))
    elif kind == "pt2":
        torch.export.save(torch.export.export(Own(), (IMAGES,), dynamic_shapes=batch), path)
    else:
        torch.onnx.export(Own().eval(), (IMAGES,), path, dynamo=True, dynamic_shapes=batch, verbose=False)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["pt", "pt2", "onnx"])
def test_features_come_from_a_network_in_a_file(kind: str, tmp_path: Path) -> None:
    (network,) = feature_networks(["judge", str(file_of(kind, tmp_path))])
    features = network.features(IMAGES.repeat(30, 1, 1, 1))  # more than are computed at once
    assert torch.allclose(features, Own()(IMAGES).repeat(30, 1), atol=1e-6)
    assert network.described == f"the network of own.{kind}"


def test_a_network_that_returns_no_features_is_refused() -> None:
    network = FileNetwork("custom", "the network of a.pt", lambda images: images.float(), "0")
    with pytest.raises(TrainerError, match=r"returns \[5, 1, 28, 28\] for 5 images; it must return \[5, number"):
        network.features(IMAGES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", "needs the network's weights, and no file is given: download https://github.com/toshas"),
        ("inception=missing.pth", "missing.pth is missing: download"),
        ("clip", "download https://openaipublic"),
        ("dino", "there is no such file; give judge, inception=FILE, clip=FILE, or the path of a network"),
        ("clip=broken.pt", "does not have OpenAI's weights of CLIP"),
        ("inception=broken.pt", "does not have torch-fidelity's weights of Inception-v3"),
        ("broken.pt", "broken.pt cannot be read as a TorchScript module"),
    ],
)
def test_features_that_cannot_be_had_are_refused_with_the_remedy(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.pt").write_bytes(b"no weights")
    monkeypatch.setattr(sys, "argv", ["ganserve-trainer", "evaluate", "run", "--features", name])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of Inception-v3 as they are before a training, in torch-fidelity's form."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def nothing(*_: object, **__: object) -> dict[str, object]:
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", nothing)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", nothing)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_gives_comparable_figures_and_its_score_beside_the_judges(
    inception_weights: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no other test gets this judge
    monkeypatch.setattr(measure_module, "_LEAST_IMAGES", 4)
    monkeypatch.setattr(judge_module, "_EPOCHS", 0)
    monkeypatch.setattr(judge_module, "_LEAST_STEPS", 2)
    train, test = (load_dataset("mnist", data_root, train=part) for part in (True, False))
    monkeypatch.setattr(measure_module, "_TEST_IMAGES", 12)
    pixels = train.images[:12].permute(0, 2, 3, 1).numpy()
    networks = feature_networks(["judge", f"inception={inception_weights}"])
    evaluation = measure(
        lambda _, labels: pixels[: len(labels)],
        pb.ModelCard(latent_dim=1),
        train,
        test,
        data_root,
        12,
        networks=networks,
    )
    figures = {metric["name"]: metric for metric in evaluation.metrics}
    compared = {f"{name}_inception" for name in ("kid", "precision", "recall", "density", "coverage")}
    # The judge is hardly trained, so its own figures are withheld.
    assert figures.keys() == compared | {"inception_score"}
    assert "Inception-v3, its 2,048 pooled features by torch-fidelity" in figures["kid_inception"]["method"]
    assert 1 <= figures["inception_score"]["value"] < 1008
    reasons = {each["name"]: each["reason"] for each in evaluation.withheld}
    assert "FID needs more than the 2048 features" in reasons["fid_inception"]
    assert "the judge is right on" in reasons["fid"]

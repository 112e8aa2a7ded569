from pathlib import Path

import pytest
import torch

from ganserve_trainer.data.clustering import cluster_bounds, k_means
from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.networks.generator import build_generator
from ganserve_trainer.settings import from_preset
from ganserve_trainer.train.run import Run

SPEC = ImageSpec(1, 28, 28, ())


def test_k_means_finds_what_lies_together() -> None:
    kinds = torch.tensor([0, 120, 250]).repeat(40)
    images = (kinds[:, None, None, None] + torch.randint(5, (120, 3, 20, 28))).to(torch.uint8)
    cluster = k_means(images, 3)
    for kind in (0, 120, 250):
        assert len(cluster[kinds == kind].unique()) == 1
    assert len(cluster.unique()) == 3
    assert torch.equal(k_means(images, 3), cluster)


def test_images_that_are_all_alike_leave_clusters_empty() -> None:
    cluster = k_means(torch.full((10, 1, 8, 8), 7, dtype=torch.uint8), 4)
    assert len(cluster.unique()) == 1
    assert torch.isfinite(cluster_bounds(cluster, 4)).all()


def test_latents_fall_into_clusters_as_often_as_images_do() -> None:
    cluster = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)
    generator = build_generator(from_preset("dcgan", {"clusters": 3, "width": 4}), SPEC)
    generator.bounds.copy_(cluster_bounds(cluster, 3))
    found = generator.cluster(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)))
    assert (found.bincount() / 20_000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)


def test_the_first_value_of_the_latent_decides_the_cluster_of_the_image() -> None:
    generator = build_generator(from_preset("dcgan", {"clusters": 2, "width": 4}), SPEC).eval()
    latent = torch.randn(1, 64).repeat(3, 1)
    latent[:, 0] = torch.tensor([-1e-3, -2e-3, 1e-3])
    assert generator.cluster(latent).tolist() == [0, 0, 1]
    near, same, far = generator(latent)
    assert (near - far).abs().mean() > 10 * (near - same).abs().mean()


def test_the_discriminator_sees_clusters_of_real_and_generated_images(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    training = Run(from_preset("dcgan", {"clusters": 5, "width": 4}), dataset, torch.device("cpu"))
    images, label = training._real_batch()
    assert label is not None
    whole = {
        image.numpy().tobytes(): int(kind)
        for image, kind in zip(dataset.images, k_means(dataset.images, 5), strict=True)
    }
    raw = ((images + 1) * 127.5).round().to(torch.uint8)
    assert label.tolist() == [whole[image.contiguous().numpy().tobytes()] for image in raw]
    latent, fake_label = training._draw("step")
    assert fake_label is not None
    assert torch.equal(fake_label, training.generator.cluster(latent))
    assert training.discriminator.embedding is not None
    assert training.discriminator.embedding.weight.shape[0] == 5


def test_clusters_are_for_unconditional_networks() -> None:
    for preset, clusters in (("cdcgan", 5), ("dcgan", 1)):
        with pytest.raises(TrainerError, match="clusters must be 2 or more"):
            from_preset(preset, {"clusters": clusters})

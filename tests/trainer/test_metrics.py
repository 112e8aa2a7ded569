import math
import statistics

import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ganserve_trainer.metrics import (
    class_histogram,
    data_copying,
    density_coverage,
    fid,
    inception_score,
    kid,
    kl_divergence,
    label_accuracy,
    nearest,
    precision_recall,
    with_standard_errors,
)


def normal(count: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(*points: float) -> Tensor:
    return torch.tensor(points, dtype=torch.float64)[:, None]


def test_fid_is_that_of_two_gaussians() -> None:
    drawn = normal(500, 3)
    drawn -= drawn.mean(0)
    # Whitened: mean 0 and covariance 1, exactly.
    white = drawn @ torch.linalg.inv(torch.linalg.cholesky(drawn.T.cov())).T
    assert fid(white, white) == pytest.approx(0, abs=1e-6)
    assert fid(white, white + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25, abs=1e-6)
    # |m|² + Σ (s - 1)² for standard deviations s.
    assert fid(white, white * torch.tensor([1.0, 2.0, 4.0]) + 1) == pytest.approx(3 + 1 + 9, abs=1e-6)


def test_fid_of_fewer_images_than_features_is_finite() -> None:
    assert 0 < fid(normal(10, 32), normal(10, 32, seed=1)) < math.inf


def test_kid_is_zero_on_average_for_one_distribution_and_that_of_its_kernel_for_two() -> None:
    assert kid(normal(2000, 4), normal(2000, 4, seed=1)) == pytest.approx(0, abs=0.01)
    # Two points a and b, each many times over: (a·a/2 + 1)³ + (b·b/2 + 1)³ - 2 (a·b/2 + 1)³.
    a, b = torch.tensor([[2.0, 0.0]]).repeat(20, 1), torch.tensor([[0.0, 2.0]]).repeat(30, 1)
    assert kid(a, b) == pytest.approx(27 + 27 - 2, rel=1e-5)


class Features(torch.nn.Module):
    """What torchmetrics takes for a network: the images are features."""

    num_features = 8

    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_fid_and_kid_are_those_of_torchmetrics() -> None:
    real, generated = normal(300, 8), normal(300, 8, seed=1).relu() + 0.1
    for metric, figure in (
        (FrechetInceptionDistance(Features()), fid),
        (KernelInceptionDistance(Features(), subsets=1, subset_size=300), kid),
    ):
        metric.update(real, real=True)
        metric.update(generated, real=False)
        wanted = metric.compute()
        assert figure(real, generated) == pytest.approx(float(wanted[0] if figure is kid else wanted), rel=1e-4)


def test_the_inception_score_is_the_number_of_classes_that_occur_if_each_is_certain() -> None:
    classes = torch.arange(400) % 4
    certain = torch.nn.functional.one_hot(classes, 7).float() * 100
    assert inception_score(certain) == pytest.approx(4)
    assert inception_score(torch.zeros(400, 7)) == pytest.approx(1)


def test_standard_errors_are_the_spread_over_new_samples() -> None:
    def figures(seed: int) -> tuple[dict[str, float], dict[str, float]]:
        real, generated = normal(400, 4, seed), normal(400, 4, seed + 1) * 1.5

        def of(mine: Tensor, theirs: Tensor) -> dict[str, float]:
            ours, others = generated[mine], real[theirs]
            share = float((ours[:, 0] > 0).double().mean())
            precision, recall = precision_recall(others, ours)
            return {
                "share": share,
                "fid": fid(others, ours),
                "kid": kid(others, ours),
                "precision": precision,
                "recall": recall,
            }

        found = with_standard_errors(of, 400, 400)
        return {name: one.value for name, one in found.items()}, {
            name: one.standard_error for name, one in found.items()
        }

    drawn = [figures(2 * index) for index in range(30)]
    for name in drawn[0][0]:
        spread = statistics.stdev(values[name] for values, _ in drawn)
        stated = statistics.fmean(errors[name] for _, errors in drawn)
        # 30 samples state the spread within 13 %.
        assert 0.65 < stated / spread < 1.6, name


def test_precision_and_recall_by_hand() -> None:
    # Radii with k=1: real 1, 1, 4; generated 0.5, 0.5, 90.
    real, generated = line(0, 1, 5), line(1.5, 2, 92)
    precision, recall = precision_recall(real, generated, k=1)
    assert precision == pytest.approx(2 / 3)  # 1.5 and 2 are within 1 of 1 and 4 of 5; 92 is far off
    assert recall == pytest.approx(2 / 3)  # 1 is within 0.5 of 1.5, 5 within 90 of 92; 0 is in no ball
    assert precision_recall(generated, real, k=1) == pytest.approx((recall, precision))


def test_density_and_coverage_by_hand() -> None:
    # Radii with k=1: 1, 1, 4; 1.5 is in the balls of 1 and 5, 2 of both too, 92 in none.
    density, coverage = density_coverage(line(0, 1, 5), line(1.5, 2, 92), k=1)
    assert density == pytest.approx(4 / 3)
    assert coverage == pytest.approx(2 / 3)
    # With k=2 the radii are 5, 4, 5, and 1.5 and 2 are in all three balls.
    assert density_coverage(line(0, 1, 5), line(1.5, 2, 92), k=2) == pytest.approx((6 / (2 * 3), 1))


def test_an_outlier_raises_recall_and_not_coverage() -> None:
    real, inside = normal(200, 2), normal(100, 2, seed=1) * 0.01
    outside = torch.cat([inside, torch.tensor([[50.0, 50.0], [-50.0, -50.0]])])
    assert precision_recall(real, inside, k=3)[1] < 0.1
    assert precision_recall(real, outside, k=3)[1] > 0.9
    assert density_coverage(real, inside, k=3) == pytest.approx(density_coverage(real, outside, k=3), rel=0.03)


def test_a_collapsed_generator_has_precision_and_no_recall_nor_coverage() -> None:
    real = normal(3000, 8).float()
    collapsed = real.mean(0).repeat(2500, 1)
    precision, recall = precision_recall(real, collapsed)
    assert (precision, recall) == (1.0, 0.0)
    _, coverage = density_coverage(real, collapsed)
    assert coverage < 0.5
    assert density_coverage(real, normal(3000, 8, seed=1).float())[1] > 0.9


def test_equal_distributions_have_equal_precision_and_recall_and_density_one() -> None:
    # More rows than are computed at once, and not a multiple.
    real, generated = normal(2500, 4), normal(2500, 4, seed=1)
    precision, recall = precision_recall(real, generated)
    assert precision == pytest.approx(recall, abs=0.03)
    density, coverage = density_coverage(real, generated)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02)  # Naeem et al., proposition 1: about 1 - 1/2^k


def test_nearest_neighbours_are_those_of_torch_cdist() -> None:
    points, among = normal(1200, 5), normal(700, 5, seed=1) + 100
    distance, index = nearest(points, among, k=3)
    wanted = torch.cdist(points, among).topk(3, largest=False)
    assert torch.equal(index, wanted.indices)
    assert torch.allclose(distance, wanted.values)


def test_data_copying_is_the_share_of_pairs_in_which_the_generated_image_is_nearer() -> None:
    test_to_train = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert data_copying(torch.zeros(3), test_to_train) == 1.0
    assert data_copying(torch.full((3,), 9.0), test_to_train) == 0.0
    assert data_copying(test_to_train, test_to_train) == 0.5
    # 2 is nearer than 3 and 4 and as near as 2; 3.5 is nearer than 4.
    assert data_copying(torch.tensor([2.0, 3.5]), test_to_train) == pytest.approx((2.5 + 1) / 8)


def test_an_oracle_that_copies_training_images_is_told_from_new_images() -> None:
    train, test, new = normal(500, 16), normal(200, 16, seed=1), normal(200, 16, seed=2)
    usual = nearest(test, train)[0][:, 0]
    assert data_copying(nearest(new, train)[0][:, 0], usual) == pytest.approx(0.5, abs=0.1)
    copies = torch.cat([train[:100] + 1e-3, new[:100]])
    assert data_copying(nearest(copies, train)[0][:, 0], usual) == pytest.approx(0.75, abs=0.05)


def test_classes_are_counted_and_compared() -> None:
    assert class_histogram(torch.tensor([0, 2, 2]), 4).tolist() == [1, 0, 2, 0]
    assert label_accuracy(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])) == 0.75


def test_kl_divergence_by_hand() -> None:
    assert kl_divergence(torch.tensor([5, 5]), torch.tensor([70, 70])) == 0.0
    # All in one of four equal modes: log 4; half of the modes: log 2.
    assert kl_divergence(torch.tensor([9, 0, 0, 0]), torch.ones(4)) == pytest.approx(math.log(4))
    assert kl_divergence(torch.tensor([3, 3, 0, 0]), torch.ones(4)) == pytest.approx(math.log(2))
    assert kl_divergence(torch.tensor([1, 3]), torch.tensor([1, 1])) == pytest.approx(0.1308, abs=1e-4)
    assert kl_divergence(torch.tensor([1, 1]), torch.tensor([1, 0])) == math.inf

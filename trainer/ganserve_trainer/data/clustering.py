"""k-means over training images: classes for an unconditional generator to learn from (self-conditioned GANs)."""

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST_SIDE = 16  # images are first averaged down to at most this many pixels a side
_ITERATIONS = 30
_ROWS_AT_ONCE = 10_000


def k_means(images: Tensor, clusters: int) -> Tensor:
    """Cluster images, uint8 [n, c, h, w], by Lloyd's algorithm, starting at k-means++ centres with a fixed seed.

    Returns:
        Each image's cluster, int64 [n], on the images' device. Clusters may be empty if images are few or identical.
    """
    size = (min(images.shape[2], _LARGEST_SIDE), min(images.shape[3], _LARGEST_SIDE))
    parts = [F.adaptive_avg_pool2d(part.float().div(255), size).flatten(1) for part in images.split(_ROWS_AT_ONCE)]
    points = torch.cat(parts)
    # k-means++ (Arthur & Vassilvitskii, 2007): draw each centre with a probability proportional to its squared distance
    # to the nearest centre so far.
    generator = torch.Generator().manual_seed(0)
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    distance = torch.full_like(points[:, 0], torch.inf)
    for _ in range(min(clusters, len(points)) - 1):
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
        weight = distance.cpu() + 1e-12  # in case all images are identical
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    centres = points[chosen]
    cluster = torch.empty(0)
    for _ in range(_ITERATIONS):
        # |x - c|² = |x|² - 2 x·c + |c|², where |x|² does not affect the minimum.
        norm = centres.square().sum(1)
        cluster = torch.cat(
            [torch.addmm(norm, part, centres.T, alpha=-2).argmin(1) for part in points.split(_ROWS_AT_ONCE)]
        )
        member = F.one_hot(cluster, len(centres)).float()
        count = member.sum(0)
        centres = torch.where(count[:, None] > 0, member.T @ points / count[:, None].clamp(min=1), centres)
    return cluster


def cluster_bounds(cluster: Tensor, clusters: int) -> Tensor:
    """Return the bounds [clusters - 1] between which a standard normal value falls as often as each cluster occurs."""
    share = cluster.cpu().bincount(minlength=clusters).double() / len(cluster)
    bounds: Tensor = torch.special.ndtri(share.cumsum(0)[:-1].clamp(1e-6, 1 - 1e-6)).float()
    return bounds

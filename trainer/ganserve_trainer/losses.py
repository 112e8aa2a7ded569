"""GAN losses on logits. They know nothing of the networks or the loop."""

from torch import Tensor
from torch.nn import functional as F


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy on logits, real against fake (Goodfellow et al., 2014, eq. 1), averaged over the batch."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss: maximise log D(G(z)) (Goodfellow et al., 2014, section 3), averaged over the batch."""
    return F.softplus(-fake_logits).mean()

"""Training of one run by several processes (torchrun) with one device each; a single process is a special case.

Every process draws the latents of the whole global batch and takes its own rows. Gradients are averaged over processes,
and BatchNorm's statistics are taken over all of them. So n processes with batch b compute the same as one process with
batch n·b, except for the random numbers within a step (dropout, augmentation, WGAN-GP's points, mismatched labels),
which each process draws itself.
"""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.train.devices import best_device


def start() -> None:
    """Join the process group if torchrun started several processes: over NCCL on GPUs, over Gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        best_device()  # over NCCL, each process talks through a GPU of its own
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """Return the rank of this process; process 0 writes the files."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def count() -> int:
    """Return how many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@contextmanager
def failing_together() -> Iterator[None]:
    """End all processes with an error if the block fails in one of them; otherwise the others would wait for it.

    Raises:
        TrainerError: the block failed in another process, which the text names.
    """
    if count() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except (TrainerError, OSError) as error:
        own = error
    # Not the text of another's error, where this process has one.
    errors = [error for error in _gathered(str(own) if own else None) if error[1] is not None]
    if own is not None:
        raise own
    if errors:
        where, text = errors[0]
        raise TrainerError(f"{where} has failed: {text}")


def check_same(facts: dict[str, str]) -> None:
    """Compare facts about the run, such as the digest of its data, over the processes.

    Raises:
        TrainerError: a process differs from process 0, in all processes.
    """
    if count() == 1:
        return
    (first, expected), *others = _gathered(facts)
    for where, theirs in others:
        if differing := [name for name in expected if theirs[name] != expected[name]]:
            details = "; ".join(f"{name}: {expected[name]} in {first}, {theirs[name]} in {where}" for name in differing)
            raise TrainerError(
                f"all processes must train the same run from the same data, but {where} has other "
                f"{' and '.join(differing)} than {first} ({details}). Give each machine the same files, versions and "
                "options, and share --out or copy the run's folder to each"
            )


def _gathered(own: Any) -> list[tuple[str, Any]]:
    """Return the value of each process, with the process and its machine."""
    named = (f"process {rank()} on {socket.gethostname()}", own)
    found: list[Any] = [None] * count()
    torch.distributed.all_gather_object(found, named)
    return found


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over processes, in one message."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= count()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def average(values: Tensor) -> Tensor:
    """Return the mean over processes."""
    if count() > 1:
        torch.distributed.all_reduce(values)
        values /= count()
    return values


def any_is_true(value: bool, device: torch.device) -> bool:
    """Return whether the value is true in any process; all processes must call this."""
    return bool(average(torch.tensor(float(value), device=device)).item() > 0)


class _Sum(torch.autograd.Function):
    """The differentiable sum over processes: in the backward pass, each process gets the sum of all gradients."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        """Return the sum of x over processes."""
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Return the sum of the gradient over processes."""
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def _sum(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)
    return total


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes, on any device; PyTorch's own SyncBatchNorm needs GPUs."""

    def _check_input_dim(self, _: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, [n, c, …]."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        axes = [axis for axis in range(x.dim()) if axis != 1]
        x = x.float()
        mean: Tensor = _sum(x.mean(axes)) / count()
        shape = (1, -1, *[1] * (x.dim() - 2))
        centred = x - mean.view(shape)
        variance: Tensor = _sum(centred.square().mean(axes)) / count()
        with torch.no_grad():
            values = x.numel() // x.shape[1] * count()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * values / (values - 1), self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
        return centred * (self.weight * torch.rsqrt(variance + self.eps)).view(shape) + self.bias.view(shape)


def synchronise_batch_norm(network: nn.Module) -> None:
    """Replace each BatchNorm with a SynchronisedBatchNorm with the same weights, if there are several processes."""
    if count() == 1:
        return
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                synchronised = SynchronisedBatchNorm(layer.num_features, layer.eps, layer.momentum)
                synchronised.to(layer.weight.device)
                synchronised.load_state_dict(layer.state_dict())
                setattr(parent, name, synchronised)

"""A run: networks, optimisers and EMA on one device, and one step of training.

Progress is counted in images seen, and each step's random state is derived from the progress and the seed. So a run
that was stopped and resumed ends with the same weights as an uninterrupted run, on the same device and library
versions.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ganserve_trainer.data.clustering import cluster_bounds, k_means
from ganserve_trainer.data.datasets import Dataset
from ganserve_trainer.errors import DivergedError, TrainerError
from ganserve_trainer.networks.augmentation import augment
from ganserve_trainer.networks.discriminator import build_discriminator, lower_layers
from ganserve_trainer.networks.generator import build_generator
from ganserve_trainer.objectives import Batch, Objective
from ganserve_trainer.report.history import History
from ganserve_trainer.settings import Settings
from ganserve_trainer.train import processes
from ganserve_trainer.train.checkpoints import Checkpoint, all_finite
from ganserve_trainer.train.devices import fits, keep_freed_memory
from ganserve_trainer.train.ema import EMA
from ganserve_trainer.train.weights import Weights


class Run:
    """A run at `images_seen` images. Here, `settings.precision` is fp32 or bf16, but not auto."""

    def __init__(self, settings: Settings, dataset: Dataset, device: torch.device) -> None:
        keep_freed_memory()
        self.settings = settings
        self.spec = dataset.spec
        self.device = device
        self.dataset_digest = dataset.digest()
        self.images_seen = 0
        self.elapsed_s = 0.0
        self.scheduled_s = 0.0  # the time by which a schedule with minutes goes; the same in all processes
        self.history = History()
        self.images_a_step = settings.batch_size * settings.discriminator_steps * processes.count()
        # Kept on the device, as bytes, if it fits; otherwise where it is, which may be mapped from a file.
        self.images = dataset.images.to(device) if fits(dataset.images.nbytes, device) else dataset.images
        self.labels = dataset.labels.to(device)
        self._classes = len(self.spec.class_names) if settings.conditional else settings.clusters
        self._batch = settings.batch_size * processes.count()
        if len(self.images) < 2 * processes.count():
            raise TrainerError(
                f"the training part has {len(self.images)} images; each process needs at least 2: add images"
            )
        if len(self.images) < self._batch:
            raise TrainerError(
                f"the data set has {len(self.images)} images, fewer than a batch of {self._batch}; "
                f"use --batch-size {max(2, len(self.images) // processes.count())} or fewer"
            )
        torch.manual_seed(settings.seed)
        self.generator = build_generator(settings, self.spec)
        self.discriminator = build_discriminator(settings, self.spec)
        if settings.clusters:
            # The labels of a self-conditioned GAN (Liu et al., 2020): clusters of the images by k-means.
            self._clusters = k_means(self.images, settings.clusters).to(device)
            self.generator.bounds.copy_(cluster_bounds(self._clusters, settings.clusters))
        for network in (self.generator, self.discriminator):
            network.to(device).to(memory_format=torch.channels_last)
        self.ema = EMA(self.generator, settings.ema_half_life_images, settings.ema_warm_up)
        processes.synchronise_batch_norm(self.generator)
        bf16, betas = settings.precision == "bf16", (settings.beta1, settings.beta2)
        self.generator_weights = Weights(self.generator, betas, bf16=bf16)
        self.discriminator_weights = Weights(
            self.discriminator, betas, bf16=bf16, frozen=lower_layers(self.discriminator, settings.freeze_discriminator)
        )
        if settings.compile:
            self.generator.layers.compile()
            self.discriminator.trunk.compile()
        self._autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        augmented = partial(augment, names=settings.augmentations())
        self._objective = Objective(settings, self.discriminator, self._classes, augmented, self._autocast)
        # The type to which the networks would convert images anyway.
        self._image_type = torch.bfloat16 if bf16 and not settings.augmentations() else torch.float32
        self._grow()
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def step(self) -> Tensor:
        """Take the discriminator's steps, and then the generator's; the settings have their numbers.

        Returns:
            Both losses and the discriminator's accuracies on real and on generated images, [4], as means over the step,
            for this process.
        """
        settings = self.settings
        rates = settings.learning_rates(self.images_seen, self.scheduled_s)
        self.generator_weights.learning_rate, self.discriminator_weights.learning_rate = rates
        judged: list[Tensor] = []
        for index in range(settings.discriminator_steps):
            real, drawn = self._parts(*self._real_batch()), self._parts(*self._draw("step"))
            # The generator's step reuses the images of the last discriminator step, so these need gradients. A batch in
            # parts is generated again instead, because the graphs of all its parts take the memory of a whole batch.
            reused = index == settings.discriminator_steps - 1 and settings.accumulate == 1
            fake: Iterable[Batch] = self._generated(drawn, gradients=reused)
            if reused:
                fake = kept = list(fake)
            self.discriminator_weights.descend(self._discriminator_objectives(real, fake, judged))
            if settings.adversarial_loss.clips_weights:
                self.discriminator_weights.clip(settings.weight_clip)
            self.images_seen += self._batch

        self.discriminator_weights.requires_grad_(False)
        losses: list[Tensor] = []
        for index in range(settings.generator_steps):
            if index:
                drawn = self._parts(*self._draw(f"generator step {index}"))
            fake = kept if reused and not index else self._generated(drawn, gradients=True)
            self.generator_weights.descend(self._generator_objectives(real, fake, losses))
        self.discriminator_weights.requires_grad_(True)
        self.ema.update(self.generator_weights, self.images_a_step, self.images_seen)
        self._grow()
        d_loss, real_accuracy, fake_accuracy = torch.stack(judged).mean(0)
        return torch.stack([d_loss, torch.stack(losses).mean(), real_accuracy, fake_accuracy])

    def gradient_norms(self) -> Tensor:
        """Return the norms of the last step's gradients over all parameters, [2]: discriminator and generator."""
        return torch.stack(
            [
                torch.nn.utils.get_total_norm(weights.gradients())
                for weights in (self.discriminator_weights, self.generator_weights)
            ]
        )

    def _draw(self, purpose: str) -> tuple[Tensor, Tensor | None]:
        """Draw this process's share of the global batch's latents and labels; then seed the layers' random numbers.

        Latents are drawn on the CPU, so that CPU and GPU start from the same latents.
        """
        settings, rank = self.settings, processes.rank()
        mine = slice(rank * settings.batch_size, (rank + 1) * settings.batch_size)
        generator = torch.Generator().manual_seed(derived_seed(settings.seed, purpose, self.images_seen))
        latent = torch.randn(self._batch, settings.latent_dim, generator=generator)[mine].to(self.device)
        label = None
        if settings.conditional:
            label = torch.randint(self._classes, (self._batch,), generator=generator)[mine].to(self.device)
        elif settings.clusters:
            label = self.generator.cluster(latent)
        seed = derived_seed(settings.seed, f"{purpose}, layers of process {rank}", self.images_seen)
        # Not torch.manual_seed, which records a stack trace at each call, for GPUs that are not initialised yet.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return latent, label

    def _parts(self, values: Tensor, labels: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Divide a batch into the parts to compute at once."""
        count = self.settings.accumulate
        return list(zip(values.chunk(count), [None] * count if labels is None else labels.chunk(count), strict=True))

    def _generated(self, drawn: list[tuple[Tensor, Tensor | None]], *, gradients: bool) -> Iterator[Batch]:
        """Generate the images of the parts of a batch, one part at a time."""
        for latent, label in drawn:
            with torch.set_grad_enabled(gradients), self._autocast():
                images = self.generator(latent, label).to(self._image_type)
            yield Batch(images, label)

    def _discriminator_objectives(
        self, real: list[tuple[Tensor, Tensor | None]], fake: Iterable[Batch], figures: list[Tensor]
    ) -> Iterator[Tensor]:
        """Compute the objective of each part, whose sum is that of the batch; append the figures of each part."""
        for part, made in zip(real, fake, strict=True):
            objective, of_part = self._objective.of_discriminator(Batch(*part), made, self.images_seen // self._batch)
            figures.append(of_part)
            yield objective / len(real) if len(real) > 1 else objective

    def _generator_objectives(
        self, real: list[tuple[Tensor, Tensor | None]], fake: Iterable[Batch], losses: list[Tensor]
    ) -> Iterator[Tensor]:
        """Compute the objective of each part, whose sum is that of the batch; append the loss of each part."""
        for part, made in zip(real, fake, strict=True):
            objective, loss = self._objective.of_generator(Batch(*part), made)
            losses.append(loss)
            yield objective / len(real) if len(real) > 1 else objective

    def _real_batch(self) -> Batch:
        """Return this process's next real images, in the epoch's order."""
        size, batches = self.settings.batch_size, len(self.images) // self._batch
        epoch, batch = divmod(self.images_seen // self._batch, batches)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.settings.seed, "epoch", epoch))
            self._order = torch.randperm(len(self.images), generator=generator).to(self.device)
            self._epoch = epoch
        start = batch * self._batch + processes.rank() * size
        index = self._order[start : start + size]
        images = self.images[index.to(self.images.device)].to(self.device).to(torch.float32).div_(127.5).sub_(1)
        label = None
        if self.settings.conditional:
            label = self.labels[index]
        elif self.settings.clusters:
            label = self._clusters[index]
        return Batch(images.to(self._image_type, memory_format=torch.channels_last), label)

    @torch.no_grad()
    def show(self, latent: Tensor, label: Tensor | None) -> Tensor:
        """Return the EMA generator's images for these latents, in -1…1."""
        images: Tensor = self.ema.network(latent.to(self.device), None if label is None else label.to(self.device))
        return images

    def checkpoint(self) -> Checkpoint:
        """Return the whole state.

        Raises:
            TrainerError: the weights are no longer finite.
        """
        generator, discriminator = self.generator_weights.state_dict(), self.discriminator_weights.state_dict()
        if not all_finite(generator) or not all_finite(discriminator):
            raise diverged(self.images_seen)
        return Checkpoint(
            settings=self.settings,
            spec=self.spec,
            dataset_digest=self.dataset_digest,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            images_seen=self.images_seen,
            elapsed_s=self.elapsed_s,
            history=self.history,
            generator=generator,
            discriminator=discriminator,
            ema=self.ema.network.state_dict(),
            generator_optimizer=self.generator_weights.optimizer_state(),
            discriminator_optimizer=self.discriminator_weights.optimizer_state(),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint's state.

        Raises:
            TrainerError: its weights do not fit the networks.
        """
        self.images_seen = checkpoint.images_seen
        self.elapsed_s = self.scheduled_s = checkpoint.elapsed_s
        self.history = checkpoint.history
        try:
            self.generator_weights.load_state_dict(checkpoint.generator, checkpoint.generator_optimizer)
            self.discriminator_weights.load_state_dict(checkpoint.discriminator, checkpoint.discriminator_optimizer)
            self.ema.network.load_state_dict(checkpoint.ema)
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainerError(f"the checkpoint's weights do not fit its settings: {error}") from error
        self._grow()

    def _grow(self) -> None:
        for network in (self.generator, self.discriminator, self.ema.network):
            network.grow_to(self.images_seen)


def diverged(images_seen: int) -> DivergedError:
    """Return the error for a run whose losses or weights are no longer finite."""
    return DivergedError(
        f"losses or weights are no longer finite after {images_seen} images; the last checkpoint, if there is one, is "
        "older than that; try a smaller --learning-rate or --precision fp32"
    )


def derived_seed(seed: int, purpose: str, count: int) -> int:
    """Return a 63-bit seed for one purpose at one point of the run."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{count}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

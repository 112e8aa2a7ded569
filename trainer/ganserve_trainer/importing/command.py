"""Imports a file: reads, looks, rewrites, checks; then shows the result, and publishes it."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from ganserve_trainer.errors import TrainerError, one_line
from ganserve_trainer.export.comparing import check_effect_of_latent, open_session
from ganserve_trainer.export.inputs import Values, part, run_session
from ganserve_trainer.export.publish import publish_with_card
from ganserve_trainer.importing.looking import Images, Inputs, class_names, look_at_images, look_at_inputs
from ganserve_trainer.importing.rewriting import Way, served
from ganserve_trainer.importing.source import Source, numpy_type
from ganserve_trainer.model_file import load_session
from ganserve_trainer.report.pictures import save_contact_sheet

_SAMPLES = 16
_AMONG = 3  # images that are made in one batch
_COLUMNS = 4
_SHOWN_NAMES = 10
_ALLOWED_DIFFERENCE = 1  # grey level


@dataclass(frozen=True, slots=True)
class Import:
    """A served model that is not published yet."""

    source: Source
    model: onnx.ModelProto
    inputs: Inputs
    images: Images
    class_names: tuple[str, ...]
    way: Way
    pixels: NDArray[np.uint8]  # of some seeds: [n, height, width, channels]

    def lines(self) -> Iterator[str]:
        """Yield what was understood, a line each."""
        for note in self.source.notes:
            yield f"file: {note}"
        yield f"latent: {self.inputs.latent}: {self.inputs.latent_dim} values"
        if self.inputs.label is not None:
            names = ", ".join(self.class_names[:_SHOWN_NAMES]) + ", …" * (len(self.class_names) > _SHOWN_NAMES)
            kind = ", one-hot" * self.inputs.one_hot
            yield f"label: {self.inputs.label}{kind}: {self.inputs.classes} classes, {names}"
        for each in self.inputs.further:
            yield f"{each.described}: {each.input}: {each.reason}"
        images = self.images
        kind = f"{numpy_type(images.type)} {images.layout}"
        yield (
            f"image: {images.name!r}, {kind}: {images.width}x{images.height}, {images.channels} "
            f"channel{'s' * (images.channels > 1)}, values of {images.values}"
        )
        if self.way.value:
            yield f"changed: {self.way.value}"

    def save_sheet(self, path: Path) -> None:
        """Write the images of some seeds as a PNG."""
        images = torch.from_numpy(self.pixels).permute(0, 3, 1, 2)
        save_contact_sheet(images / 127.5 - 1, _COLUMNS, path)

    def publish(self, repository: Path, name: str) -> Path:
        """Publish the model as the next version of model `name`; return the file."""
        inputs = self.inputs.served
        session = open_session(self.model)
        check_effect_of_latent(session, inputs)
        return publish_with_card(
            self.model,
            session,
            repository,
            name,
            inputs=inputs,
            shape=self.pixels.shape[1:],
            class_names=self.class_names,
            architecture=self.source.architecture,
            dataset="",
            parameters=self.source.parameters,
        )


def prepare(source: Source) -> Import:
    """Turn a generator into a served model, and compare its images with the original's.

    Raises:
        TrainerError: something cannot be guessed, or the images do not depend on their own latent and label only.
    """
    inputs = look_at_inputs(source)
    seeds = np.arange(_SAMPLES)
    shown = inputs.served.values(seeds)
    outputs = inputs.run(source, shown)
    images = look_at_images(outputs, source.wishes)
    wanted = images.pixels(outputs[images.name])
    _check_independence(source, inputs, images, shown, wanted)
    compared = [(shown, wanted)]
    if inputs.further:
        varied = inputs.served.values(seeds, varied=True)
        compared.append((varied, images.pixels(inputs.run(source, varied)[images.name])))
    failed = []
    for way in Way:
        if way is Way.ONE_BY_ONE and inputs.batch > 1:
            continue
        try:
            model = served(source.model, inputs, images, way)
            session = load_session(model.SerializeToString(), quiet=True)
            for (values, pixels), (start, stop) in itertools.product(compared, ((0, 1), (1, 1 + _AMONG))):
                made = run_session(session, part(values, start, stop))
                if (
                    made.shape != pixels[start:stop].shape
                    or _difference(made, pixels[start:stop]) > _ALLOWED_DIFFERENCE
                ):
                    raise TrainerError(f"{len(made)} images at once differ from those made {inputs.batch} at a time")
        except Exception as error:  # onnx's and onnxruntime's exceptions have no common root
            failed.append(one_line(error))
        else:
            return Import(source, model, inputs, images, class_names(source, inputs), way, wanted)
    raise TrainerError(
        f"the model works for {inputs.batch} images at once only: {failed[0]}; export it again with a dynamic batch "
        "dimension"
    )


def _check_independence(
    source: Source, inputs: Inputs, images: Images, values: Values, wanted: NDArray[np.uint8]
) -> None:
    """Reject a generator whose image is another one the second time, or among other images."""

    def difference(batch: int, count: int) -> int:
        raw = dataclasses.replace(inputs, batch=batch).run(source, part(values, 0, count))[images.name]
        return _difference(images.pixels(raw), wanted[:count])

    if difference(inputs.batch, len(wanted)) > _ALLOWED_DIFFERENCE:
        raise TrainerError(
            "the same latent gives a different image each time: the generator draws random numbers; make its noise "
            "constant (StyleGAN: noise_mode='const') and switch dropout off"
        )
    try:
        # With a fixed number of images, the first one is repeated in the place of the others.
        among = difference(inputs.batch, 1) if inputs.batch > 1 else difference(_AMONG, _AMONG)
    except (TrainerError, KeyError):  # it works for one image only
        return
    if among > _ALLOWED_DIFFERENCE:
        raise TrainerError(
            f"an image differs by up to {among} grey levels among other images: the generator takes means over the "
            "batch, as BatchNorm does in training mode; export it in evaluation mode, after model.eval()"
        )


def _difference(pixels: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> int:
    """Return the largest difference, in grey levels."""
    return int(np.abs(pixels.astype(np.int16) - wanted).max())

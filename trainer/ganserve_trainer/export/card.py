"""The model card: the description of a model in its file, with golden images and the metrics of an evaluation."""

import dataclasses
import hashlib
import importlib.metadata

import numpy as np
import onnx
import onnxruntime
from google.protobuf import json_format

from ganserve._cards import MAX_CARD_BYTES, png, thumbnail
from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export.inputs import Inputs, run_session
from ganserve_trainer.model_file import CARD_KEY, load_session
from ganserve_trainer.networks.architecture import parameter_count
from ganserve_trainer.settings import ExportPrecision
from ganserve_trainer.train.checkpoints import Checkpoint

_GOLDEN_SEEDS = range(10)


def card_of(model: onnx.ModelProto, checkpoint: Checkpoint, precision: ExportPrecision) -> pb.ModelCard:
    """Describe an exported model, with golden images, without quality metrics."""
    session = load_session(model.SerializeToString())
    settings, spec = checkpoint.settings, checkpoint.spec
    configuration = {key: str(value) for key, value in dataclasses.asdict(settings).items()}
    configuration["dataset_digest"] = checkpoint.dataset_digest
    card = pb.ModelCard(
        architecture=settings.preset,
        dataset=settings.dataset,
        latent_dim=settings.latent_dim,
        height=spec.height,
        width=spec.width,
        channels=spec.channels,
        class_names=spec.class_names if settings.conditional else (),
        generator_parameters=parameter_count(checkpoint.ema_generator()),
        training=pb.Training(images_seen=checkpoint.images_seen, device=checkpoint.device, configuration=configuration),
        golden_images=golden_images(
            session, Inputs.plain(settings.latent_dim, len(spec.class_names) if settings.conditional else 0)
        ),
        trainer_version=importlib.metadata.version("ganserve"),
        precision=precision,
    )
    card.training.duration.FromMilliseconds(round(checkpoint.elapsed_s * 1000))
    card.created_at.GetCurrentTime()
    return card


def golden_images(session: onnxruntime.InferenceSession, inputs: Inputs) -> list[pb.GoldenImage]:
    """Make the images of a few seeds, which a server compares with its own."""
    golden = []
    for seed in _GOLDEN_SEEDS:
        pixels = run_session(session, inputs.values(np.array([seed])))[0]
        golden.append(
            pb.GoldenImage(
                seed=seed,
                label=seed % inputs.classes if inputs.classes else None,
                digest=f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}",
                png=png(thumbnail(pixels)),
            )
        )
    return golden


def with_card(model: onnx.ModelProto, card: pb.ModelCard) -> bytes:
    """Return the file's content: the checked model, with the card in its metadata.

    Raises:
        TrainerError: no server would accept the card, because it is too large.
    """
    if (size := card.ByteSize()) > MAX_CARD_BYTES:
        raise TrainerError(
            f"the model card has {size:,} bytes; servers accept {MAX_CARD_BYTES:,}: shorten the names of the "
            f"{len(card.class_names)} classes, or the card's other texts"
        )
    entry = model.metadata_props.add()
    entry.key = CARD_KEY
    entry.value = json_format.MessageToJson(card)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()

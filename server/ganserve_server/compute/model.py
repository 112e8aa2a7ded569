"""A model version that was loaded and verified, ready to run."""

from dataclasses import dataclass, field

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.engine import Engine
from ganserve_server.compute.inputs import Inputs


@dataclass(frozen=True, slots=True, eq=False)
class ModelVersion:
    """A model that passed all rules, ready to run."""

    name: str
    version: int
    digest: str
    card: pb.ModelCard
    engine: Engine
    answer: bytes  # the serialised fields that all GenerateImagesResponses of this version share

    classes: int = field(init=False)
    pixel_bytes: int = field(init=False)  # of one image

    @classmethod
    def of(cls, name: str, version: int, digest: str, card: pb.ModelCard, engine: Engine) -> "ModelVersion":
        """Return the version of a model."""
        answer = pb.GenerateImagesResponse(
            model=name,
            version=version,
            digest=digest,
            provider=engine.provider,
            height=card.height,
            width=card.width,
            channels=card.channels,
        )
        return cls(name, version, digest, card, engine, answer.SerializeToString())

    def __post_init__(self) -> None:
        """Read the card's values that each request needs once: access to protobuf's fields is slow."""
        object.__setattr__(self, "classes", len(self.card.class_names))
        object.__setattr__(self, "pixel_bytes", self.card.height * self.card.width * self.card.channels)

    @property
    def inputs(self) -> Inputs:
        """The inputs that the model takes."""
        return self.engine.inputs

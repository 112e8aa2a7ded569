"""Images from a ganserve server, as numpy arrays, PIL images or files.

>>> from ganserve import Client
>>> with Client("127.0.0.1:50051") as client:
...     batch = client.generate("cdcgan-mnist", count=16, seed=1, label=7)
...     batch.sheet(columns=4).save("sevens.png")
"""

import os as _os
import sys as _sys
from importlib.metadata import version as _version

# The program `ganserve` reports errors itself. gRPC reads this variable when it is imported.
if _os.path.basename((_sys.argv or [""])[0]) == "ganserve":
    _os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from ganserve._async_client import AsyncClient
from ganserve._client import Client
from ganserve._latents import latents, linear, slerp
from ganserve._replicas import Replica
from ganserve.errors import (
    AuthenticationError,
    DeadlineExceededError,
    GanserveError,
    InvalidRequestError,
    MessageTooLargeError,
    ModelNotFoundError,
    NoProvenanceError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
)
from ganserve.images import GeneratedImage, ImageBatch
from ganserve.models import Attribute, Model, QualityMetric
from ganserve.provenance import Interpolation, Provenance, read_provenance

__all__ = [
    "AsyncClient",
    "Attribute",
    "AuthenticationError",
    "Client",
    "DeadlineExceededError",
    "GanserveError",
    "GeneratedImage",
    "ImageBatch",
    "Interpolation",
    "InvalidRequestError",
    "MessageTooLargeError",
    "Model",
    "ModelNotFoundError",
    "NoProvenanceError",
    "OverloadedError",
    "Provenance",
    "QualityMetric",
    "Replica",
    "RequestCancelledError",
    "ServerError",
    "UnavailableError",
    "__version__",
    "latents",
    "linear",
    "read_provenance",
    "slerp",
]

__version__ = _version("ganserve")

"""Images from a ganserve server, as numpy arrays, PIL images or files.

>>> from ganserve import Client
>>> with Client("127.0.0.1:50051") as client:
...     batch = client.generate("cdcgan-mnist", count=16, seed=1, label=7)
...     batch.sheet(columns=4).save("sevens.png")
"""

import os as _os
import sys as _sys
from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# The program `ganserve` reports errors itself. gRPC reads this variable when it is imported.
if _os.path.basename((_sys.argv or [""])[0]) == "ganserve":
    _os.environ.setdefault("GRPC_VERBOSITY", "NONE")

if _TYPE_CHECKING:
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

# Imported when they are used first: the server and the trainer use modules of this package, but not the SDK, whose
# libraries take a tenth of a second to import.
_PLACES = {
    "AsyncClient": "ganserve._async_client",
    "Attribute": "ganserve.models",
    "AuthenticationError": "ganserve.errors",
    "Client": "ganserve._client",
    "DeadlineExceededError": "ganserve.errors",
    "GanserveError": "ganserve.errors",
    "GeneratedImage": "ganserve.images",
    "ImageBatch": "ganserve.images",
    "Interpolation": "ganserve.provenance",
    "InvalidRequestError": "ganserve.errors",
    "MessageTooLargeError": "ganserve.errors",
    "Model": "ganserve.models",
    "ModelNotFoundError": "ganserve.errors",
    "NoProvenanceError": "ganserve.errors",
    "OverloadedError": "ganserve.errors",
    "Provenance": "ganserve.provenance",
    "QualityMetric": "ganserve.models",
    "Replica": "ganserve._replicas",
    "RequestCancelledError": "ganserve.errors",
    "ServerError": "ganserve.errors",
    "UnavailableError": "ganserve.errors",
    "latents": "ganserve._latents",
    "linear": "ganserve._latents",
    "read_provenance": "ganserve.provenance",
    "slerp": "ganserve._latents",
}


def __getattr__(name: str) -> _Any:
    if name in _PLACES:
        value = globals()[name] = getattr(_import_module(_PLACES[name]), name)
        return value
    if f"{__name__}.{name}" in _PLACES.values():
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

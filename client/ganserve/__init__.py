"""Images from a ganserve server, as numpy arrays, PIL images or files.

>>> from ganserve import Client
>>> with Client("127.0.0.1:50051") as client:
...     batch = client.generate("cdcgan-mnist", count=16, seed=1, label=7)
...     batch.sheet(columns=4).save("sevens.png")
"""

from importlib.metadata import version as _version

from ganserve.client import AsyncClient, Client
from ganserve.errors import (
    AuthenticationError,
    DeadlineExceededError,
    GanserveError,
    InvalidRequestError,
    MessageTooLargeError,
    ModelNotFoundError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
)
from ganserve.images import ImageBatch
from ganserve.latents import latents, linear, slerp
from ganserve.models import Model, QualityMetric

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "Client",
    "DeadlineExceededError",
    "GanserveError",
    "ImageBatch",
    "InvalidRequestError",
    "MessageTooLargeError",
    "Model",
    "ModelNotFoundError",
    "OverloadedError",
    "QualityMetric",
    "RequestCancelledError",
    "ServerError",
    "UnavailableError",
    "__version__",
    "latents",
    "linear",
    "slerp",
]

__version__ = _version("ganserve")

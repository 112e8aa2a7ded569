"""The state of each version in the repository, and the operations by which operators change what is served."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version in the repository, and whether it is served."""

    model: str
    version: int
    served: bool
    digest: str
    reason: str


class Administration(Protocol):
    """Changes which models are served: in this process (`Lifecycle`), or in all workers."""

    async def load(self, name: str) -> list[VersionState]:
        """Load a model from its folder, even if it is already served.

        Raises:
            ModelNotFound: it has no folder.
            ModelNotLoaded: none of its versions can be served.
        """

    async def unload(self, name: str) -> None:
        """Stop serving a model until it is loaded again.

        Raises:
            ModelNotFound: it is not served.
        """

    async def reload(self) -> list[VersionState]:
        """Load new versions and drop removed ones; return the state of each version in the repository."""

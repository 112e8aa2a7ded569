"""What is served, as the lifecycle decides it, and the operations by which operators change it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol

from ganserve_server.repository.probed import Probed


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version in the repository, and whether it is served."""

    model: str
    version: int
    served: bool
    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class ProbedVersion:
    """A version whose file passed the probe.

    Attributes:
        model: the name of the model.
        version: the number.
        probed: what the probe found.
        source: a path to the file that the lifecycle holds open, which is the same after it was replaced or removed.
    """

    model: str
    version: int
    probed: Probed
    source: str

    @property
    def key(self) -> tuple[str, int]:
        """The model and the number."""
        return self.model, self.version

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ProbedVersion":
        """Return the version that `to_json` wrote."""
        return cls(values["model"], values["version"], Probed(**values["probed"]), values["source"])


@dataclass(frozen=True, slots=True)
class Served:
    """What each process serves, and what it reports.

    Attributes:
        digests: of the file of each version that is served.
        opening: the versions that are being opened, and not served yet.
        models: the names of the models in the repository.
        rejected: how many files cannot be served.
        newly_rejected: how many files were rejected since the last time.
        quarantined: how many files are quarantined.
        unreadable: how many paths in the repository cannot be read.
        withdrawn: the versions that are out of service because of a batch that did not end, each with the reason.
    """

    digests: dict[tuple[str, int], str] = field(default_factory=dict)
    opening: list[tuple[str, int]] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    rejected: int = 0
    newly_rejected: int = 0
    quarantined: int = 0
    unreadable: int = 0
    withdrawn: dict[tuple[str, int], str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        values = dataclasses.asdict(self)
        values["digests"] = [[*key, digest] for key, digest in self.digests.items()]
        values["withdrawn"] = [[*key, reason] for key, reason in self.withdrawn.items()]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Served":
        """Return what `to_json` wrote."""
        digests = {(model, version): digest for model, version, digest in values["digests"]}
        opening = [(model, version) for model, version in values["opening"]]
        withdrawn = {(model, version): reason for model, version, reason in values["withdrawn"]}
        return cls(**{**values, "digests": digests, "opening": opening, "withdrawn": withdrawn})


class Servers(Protocol):
    """The process that answers calls, or all of them."""

    @property
    def processes(self) -> int:
        """How many there are."""

    async def open(self, version: ProbedVersion) -> str:
        """Open a version in all processes, without serving it; return why one cannot, or an empty text.

        Raises:
            StartError: the required provider is missing.
        """

    async def serve(self, versions: list[ProbedVersion], served: Served) -> None:
        """Serve these versions, which were opened, and no others."""


class Administration(Protocol):
    """Changes which models are served."""

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

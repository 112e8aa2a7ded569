"""The served versions, each with its queue. The services find a model here; `lifecycle` changes the table."""

from collections.abc import Container

from ganserve_server.errors import ModelNotFound, ModelNotLoaded
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.spelling import nearest


class ModelTable:
    """The served versions, by name and number."""

    def __init__(self) -> None:
        self._batchers: dict[str, dict[int, Batcher]] = {}
        self._withdrawn: dict[tuple[str, int], str] = {}  # why

    def __contains__(self, name: str) -> bool:
        """Return whether any version of a model is served."""
        return name in self._batchers

    @property
    def names(self) -> list[str]:
        """The models' names, in alphabetical order."""
        return sorted(self._batchers)

    def batchers(self) -> dict[tuple[str, int], Batcher]:
        """Return all versions, by name and number."""
        return {(name, number): one for name, versions in self._batchers.items() for number, one in versions.items()}

    def put(self, batcher: Batcher) -> Batcher | None:
        """Serve a version; return the batcher that served the same version number before, if any."""
        versions = self._batchers.setdefault(batcher.model.name, {})
        before = versions.get(batcher.model.version)
        versions[batcher.model.version] = batcher
        self._withdrawn.pop((batcher.model.name, batcher.model.version), None)
        return before

    def remove(self, name: str, version: int) -> Batcher:
        """Stop serving a version; return it."""
        batcher = self._batchers[name].pop(version)
        if not self._batchers[name]:
            del self._batchers[name]
        return batcher

    def withdraw(self, name: str, version: int, reason: str) -> Batcher:
        """Stop serving a version, and give callers the reason; return it."""
        self._withdrawn[name, version] = reason
        return self.remove(name, version)

    def keep_reasons(self, known: Container[tuple[str, int]]) -> None:
        """Forget why versions were withdrawn, except for known ones."""
        self._withdrawn = {key: reason for key, reason in self._withdrawn.items() if key in known}

    def find(self, name: str, version: int | None) -> Batcher:
        """Find a version, the newest if `version` is None.

        Raises:
            ModelNotFound: there is no such model or version; the text names those that exist.
            ModelNotLoaded: the version, or all versions, were withdrawn.
        """
        versions = self._batchers.get(name)
        if self._withdrawn and (versions is None or (version is not None and version not in versions)):
            for (withdrawn, number), reason in self._withdrawn.items():
                if withdrawn == name and version in (None, number):
                    raise ModelNotLoaded(reason)
        if versions is None:
            served = ", ".join(self.names) or "none at all"
            raise ModelNotFound(f"there is no model {name!r}; there are {served}{nearest(name, self.names)}")
        batcher = versions.get(max(versions) if version is None else version)
        if batcher is None:
            served = ", ".join(str(number) for number in sorted(versions))
            raise ModelNotFound(f"model {name} has no version {version}; it has {served}")
        return batcher

    def versions(self, name: str) -> list[int]:
        """Return the served versions of a model, in ascending order."""
        return sorted(self._batchers[name])

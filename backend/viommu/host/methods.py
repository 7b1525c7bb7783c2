"""The host SMMU's domains on the control socket.

    viommu ctl host.create domain=sandbox
    viommu ctl host.map_identity domain=sandbox
    viommu ctl host.attach endpoint=engine0 domain=sandbox
    viommu ctl host.endpoints

Without success a method is refused, with the status in its data.
"""

from collections.abc import Callable
from typing import Any, Literal

from viommu.control import Methods, Refused
from viommu.driver.domains import DomainType, NtStatus
from viommu.host.domains import HostDomains


class HostMethods:
    """What can be called. `host` gives the domains, which come into being with the first call."""

    def __init__(self, host: Callable[[], HostDomains]) -> None:
        self._host = host

    def add_to(self, methods: Methods) -> None:
        """Let them be called, as `host.create` and so on."""
        for function in (
            self.create,
            self.delete,
            self.map,
            self.map_identity,
            self.unmap,
            self.flush,
            self.domains,
            self.attach,
            self.detach,
            self.block,
            self.unblock,
            self.endpoints,
            self.faults,
        ):
            methods.add(f"host.{function.__name__}", function)

    def create(
        self,
        domain: str,
        type: Literal["translate", "pass-through"] = "translate",  # noqa: A002
    ) -> None:
        """Make a host domain. One that translates maps nothing yet."""
        _require(self._host().create(domain, DomainType(type)))

    def delete(self, domain: str) -> None:
        """Delete a host domain that no endpoint is in."""
        _require(self._host().delete(domain))

    def map(self, domain: str, iova: int, address: int, size: int, write: bool = True) -> None:
        """Map guest physical addresses from `iova` on to guest RAM at `address`."""
        _require(self._host().map(domain, iova, address, size, write=write))

    def map_identity(self, domain: str, leave_out: list[tuple[int, int]] = []) -> None:  # noqa: B006
        """Map everything to itself, but for ranges [[address, size], …] that are left out."""
        _require(self._host().map_identity(domain, leave_out))

    def unmap(self, domain: str, iova: int, size: int) -> None:
        """Unmap `size` bytes from `iova`."""
        _require(self._host().unmap(domain, iova, size))

    def flush(self, domain: str) -> None:
        """Make the host SMMU forget what it remembers of a domain."""
        _require(self._host().flush(domain))

    def domains(self) -> list[dict[str, Any]]:
        """List the host domains, and who is in them."""
        return [each._asdict() for each in self._host().domains()]

    def attach(self, endpoint: str, domain: str) -> None:
        """Let a host domain rule the DMA of an endpoint."""
        _require(self._host().attach(endpoint, domain))

    def detach(self, endpoint: str, domain: str) -> None:
        """Take an endpoint out of its host domain, and leave it blocked."""
        _require(self._host().detach(endpoint, domain))

    def block(self, endpoint: str) -> None:
        """Abort all DMA of an endpoint, wherever it was."""
        _require(self._host().block(endpoint))

    def unblock(self, endpoint: str) -> None:
        """Let a blocked endpoint pass the host SMMU by."""
        _require(self._host().unblock(endpoint))

    def endpoints(self) -> list[dict[str, Any]]:
        """List the endpoints: passing by, attached or blocked."""
        return [each._asdict() for each in self._host().endpoints()]

    def faults(self) -> list[dict[str, Any]]:
        """Give out the faults of endpoints in host domains since the last call."""
        return [each.as_dict() for each in self._host().faults()]


def _require(status: NtStatus) -> None:
    if not status.success:
        raise Refused(f"{status.name} ({status:#010x})", status=status.name)

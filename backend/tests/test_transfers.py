"""DMA in steps, where each page is there only once it was asked for."""

import pytest

from tests.domain_rig import IOVA, DomainRig
from tests.driver_rig import DATA, PAGE, STREAM
from viommu.driver.domains import DmaDevice, Fault, FaultAction, FaultConfiguration
from viommu.endpoints import transfers
from viommu.endpoints.port import DmaFault, DmaPort
from viommu.endpoints.transfers import Segment, Transfers


class Stalling:
    """A port whose faults stall until `service` answers them with another try, after mapping the page if it `maps`."""

    def __init__(self) -> None:
        self.rig = DomainRig()
        self.domain = self.rig.domain()
        self.maps, self.faults = True, 0
        device = DmaDevice("pci", STREAM, stalls=True)
        self.rig.attach(self.domain, device)
        config = FaultConfiguration(self._handle)
        assert self.rig.remapping.set_device_fault_reporting(device, 0, True, config).success
        self.port = DmaPort(self.rig.memory, STREAM, self.rig.smmu)
        self.port.bus_master = True

    def _handle(self, fault: Fault) -> FaultAction:
        assert fault.address is not None
        self.faults += 1
        if self.maps:
            page = fault.address & -PAGE
            self.rig.map(self.domain, page, DATA + page - IOVA)
        return FaultAction.RETRY

    def write(self, pieces: list[Segment]) -> None:
        data = memoryview(bytes(sum(piece.size for piece in pieces)))
        for waiting in Transfers(self.port).move(pieces, data, write=True):
            if waiting is not None:
                self.rig.remapping.service_faults()


@pytest.mark.parametrize(
    "pieces",
    [
        [Segment(IOVA, 8 * PAGE)],
        [
            Segment(IOVA + page * PAGE + 8 * piece, 8)
            for page in range(8)
            for piece in range(transfers.WINDOW)
        ],
    ],
)
def test_each_transaction_has_its_own_tries(
    monkeypatch: pytest.MonkeyPatch, pieces: list[Segment]
) -> None:
    monkeypatch.setattr(transfers, "TRIES", 2)
    stalling = Stalling()
    stalling.write(pieces)
    assert stalling.faults == 8


def test_a_transaction_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "TRIES", 2)
    stalling = Stalling()
    stalling.maps = False
    with pytest.raises(DmaFault, match="software did not let"):
        stalling.write([Segment(IOVA, 8)])
    assert stalling.faults == 3

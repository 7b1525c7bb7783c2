"""vfio-pci attaches a device to what a process maps for it, and detaches it from that."""

ENGINE = "0000:00:02.0"  # a DMA master, whose StreamID is 0x10
DRIVER = "/sys/bus/pci/drivers/vfio-pci"


def test_dma_reaches_what_is_mapped(viommu_guest, viommu_smmu):
    assert viommu_guest.python("/viommu/inside/write_page.py") == "HALTED True\n"
    assert [event["size"] for event in viommu_smmu.events("DmaMoved")] == [4096]


def test_dma_faults_when_it_is_unmapped(viommu_guest, viommu_lab):
    with viommu_lab.expect("F_TRANSLATION .*stream_id=0x10"):
        assert viommu_guest.python("/viommu/inside/write_page.py unmap") == "ERROR False\n"


def test_the_driver_attaches_and_detaches(viommu_guest, viommu_smmu):
    viommu_guest.check(f"echo {ENGINE} > {DRIVER}/unbind; echo {ENGINE} > {DRIVER}/bind")
    assert viommu_guest.python("/viommu/inside/write_page.py") == "HALTED True\n"
    assert "CMD_CFGI_STE" in {event["opcode"] for event in viommu_smmu.events("CommandConsumed")}

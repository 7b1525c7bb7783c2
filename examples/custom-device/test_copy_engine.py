"""A device of one's own behind the SMMU of a stock kernel: it copies, and it says when it may not."""

import pytest

COPY = "/viommu/inside/copy_page.py"


def test_it_copies(viommu_guest, viommu_smmu):
    assert viommu_guest.python(COPY) == "status 0, result 1, right\n"
    assert [event["size"] for event in viommu_smmu.events("DmaMoved")] == [32, 4096, 4096, 8]


@pytest.mark.parametrize("what", ["source", "destination"])
def test_an_abort_of_the_data_is_in_the_descriptor(viommu_guest, viommu_lab, what):
    with viommu_lab.expect("F_TRANSLATION .*stream_id=0x10"):
        assert viommu_guest.python(f"{COPY} {what}") == "status 0, result 2, wrong\n"


def test_an_abort_of_the_ring_is_in_the_status(viommu_guest, viommu_lab):
    with viommu_lab.expect("F_TRANSLATION .*stream_id=0x10"):
        assert viommu_guest.python(f"{COPY} ring") == "status 2, result 0, wrong\n"


def test_a_result_that_cannot_be_written(viommu_guest, viommu_faults):
    viommu_faults.load(
        'fault = [{at = "dma-requested", when = {write = true, size = 8}, do = "abort"}]'
    )
    assert viommu_guest.python(COPY) == "status 2, result 0, wrong\n"

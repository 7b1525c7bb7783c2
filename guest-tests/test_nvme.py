"""A stock NVMe driver and its disk: on aarch64 behind the stock SMMU driver, with INTx; on x86_64 with MSI-X."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvme_faults import FAULTS, Fault, meet
from nvme_rig import DISK, FUNCTION, MIB, SIZE_MIB, NvmeRig, await_event, pattern

from viommu.lab.assets import Assets
from viommu.pytest_plugin.assets import provided
from viommu.pytest_plugin.lab import Lab

MACHINES = ("aarch64", "x86_64")


@pytest.fixture(scope="module", params=MACHINES)
def booted(
    request: pytest.FixtureRequest, assets: Assets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NvmeRig]:
    directory = tmp_path_factory.mktemp("disk")
    with NvmeRig(request.param, assets, directory, volatile=True) as nvme:
        yield nvme


@pytest.fixture
def nvme(booted: NvmeRig, viommu_lab: Lab) -> NvmeRig:
    """A guest with the disk, which other tests have used and will use."""
    viommu_lab.watch(booted.guest)
    return booted


def test_the_driver_probes(nvme: NvmeRig) -> None:
    words = nvme.run("cd /sys/class/nvme/nvme0; cat model serial firmware_rev state queue_count")
    assert [line.strip() for line in words.splitlines()] == [
        "viommu NVMe", "nvme0", "1.0", "live", "2",
    ]  # fmt: skip
    assert int(nvme.run("cat /sys/block/nvme0n1/size")) == SIZE_MIB * MIB // 512
    interrupts = nvme.run("grep nvme0q1 /proc/interrupts")
    assert ("Level" if nvme.machine == "aarch64" else "PCI-MSIX") in interrupts
    if nvme.machine == "aarch64":
        assert nvme.run(f"cat {FUNCTION}/iommu_group/type").strip() == "DMA"


def test_a_file_system(nvme: NvmeRig) -> None:
    mark = nvme.mark()
    nvme.make_file_system()
    nvme.run("dd if=/dev/urandom of=/tmp/data bs=1M count=32 2>/dev/null")
    nvme.run(
        "cp /tmp/data /mnt/data && mkdir /mnt/many && cp -r /sys/module/nvme_core /mnt/many; sync"
    )
    nvme.run(f"umount /mnt && echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 {DISK} /mnt")
    sums = nvme.run("md5sum < /tmp/data; md5sum < /mnt/data; rm /tmp/data").split()
    assert sums[0] == sums[2]
    assert "parameters" in nvme.run("ls /mnt/many/nvme_core")
    nvme.run(f"umount /mnt && e2fsck -fn {DISK}")
    assert "error" not in nvme.kernel_log(mark).lower()


def test_sequential_and_random(nvme: NvmeRig) -> None:
    mark = nvme.mark()
    assert nvme.disk(f"fill {DISK} {SIZE_MIB}") == {"written": SIZE_MIB}
    assert nvme.disk(f"check {DISK} {SIZE_MIB}") == {"wrong": []}
    with nvme.image.open("rb") as file:
        for number in range(SIZE_MIB):
            assert file.read(MIB) == pattern(number, MIB), "what was flushed is in the file"
    assert nvme.disk(f"random {DISK} 16 400") == {"wrong": []}
    assert "nobody cared" not in nvme.kernel_log(mark)


def test_unbind_and_bind(nvme: NvmeRig) -> None:
    """With another type of the IOMMU group each time, where there is one."""
    assert nvme.disk(f"fill {DISK} 4") == {"written": 4}
    for kind in ("identity", "DMA-FQ", "DMA"):
        nvme.run(f"dd if={DISK} of=/dev/null bs=1M 2>/dev/null & sleep 0.2")
        nvme.run(f"cd {FUNCTION}/driver && echo 0000:01:00.0 > unbind; wait")
        assert nvme.run(f"ls {DISK} || echo gone").endswith("gone\n")
        if nvme.machine == "aarch64":
            nvme.run(f"echo {kind} > {FUNCTION}/iommu_group/type")
        nvme.run("echo 0000:01:00.0 > /sys/bus/pci/drivers/nvme/bind")
        nvme.await_disk()
        assert nvme.disk(f"check {DISK} 2") == {"wrong": []}
    assert nvme.disk(f"check {DISK} 4") == {"wrong": []}


@pytest.mark.parametrize(
    "reset", ["/sys/class/nvme/nvme0/reset_controller", f"{FUNCTION}/reset"], ids=["CC.EN", "FLR"]
)
def test_resets_under_load(nvme: NvmeRig, reset: str) -> None:
    with nvme.rig.serving.trace() as trace:
        trace.read()
        with nvme.load() as load:
            for _ in range(3):
                nvme.run(f"echo 1 > {reset}; sleep 1")
        states = [each["state"] for each in trace.read() if each["kind"] == "NvmeStateChanged"]
    assert states.count("ready") >= 3
    assert load["wrong"] == []
    assert load["rounds"] > 3


def test_detached_by_a_host_domain_under_load(nvme: NvmeRig) -> None:
    """The driver knows nothing: it times out, resets the controller, and does again what was not done."""
    control = nvme.rig.serving.control
    assert nvme.disk(f"fill {DISK} 4") == {"written": 4}
    control.call("host.create", domain="all")
    control.call("host.map_identity", domain="all")
    control.call("host.attach", endpoint="nvme0", domain="all")
    with nvme.load() as load, nvme.rig.serving.trace() as trace:
        trace.read()
        control.call("host.detach", endpoint="nvme0", domain="all")
        fatal = await_event(trace, "NvmeStateChanged", state="fatal")
        assert "host SMMU" in fatal["why"]
        control.call("host.attach", endpoint="nvme0", domain="all")
        await_event(trace, "NvmeStateChanged", state="ready")
    assert load["wrong"] == []
    assert load["rounds"] > 1
    assert nvme.disk(f"check {DISK} 4") == {"wrong": []}
    control.call("host.block", endpoint="nvme0")
    control.call("host.unblock", endpoint="nvme0")
    control.call("host.delete", domain="all")
    assert "controller is down" in nvme.run("dmesg | grep nvme")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_of_a_dma(nvme: NvmeRig, fault: Fault) -> None:
    """What the driver sees of it; done again, it is right."""
    assert meet(nvme, fault) == fault.expected(nvme.machine)


def test_processors_that_share_a_pin(assets: Assets, tmp_path: Path, viommu_lab: Lab) -> None:
    """Each lets go of it by a doorbell, whoever is in the handler; asserted for nothing, Linux would disable it."""
    readers = "; ".join(
        f"(while [ -e /run/go ]; do dd if={DISK} of=/dev/null bs={size} count=200 iflag=direct; done) &"
        for size in ("4k", "4k", "64k", "256k")
    )
    with NvmeRig("aarch64", assets, tmp_path, cpus=2) as nvme:
        viommu_lab.watch(nvme.guest)
        mark = nvme.mark()
        nvme.run(
            f"touch /run/go; ({readers.replace('&;', '&')} sleep 12; rm /run/go; wait) 2>/dev/null"
        )
        assert nvme.disk(f"fill {DISK} 8") == {"written": 8}
        assert nvme.disk(f"check {DISK} 8") == {"wrong": []}
        said = nvme.kernel_log(mark)
        assert nvme.run("nproc") == "2\n"
    assert "nobody cared" not in said
    assert "timeout" not in said


@pytest.mark.parametrize("machine", MACHINES)
def test_the_driver_is_a_module(
    machine: str, pytestconfig: pytest.Config, tmp_path: Path, viommu_lab: Lab
) -> None:
    """In Debian's kernel for any machine. That for the cloud, which the other tests boot, has it built in."""
    image = f"{machine}-generic"
    assets = provided(pytestconfig, image)
    with NvmeRig(machine, assets, tmp_path, image=image, modules="ext4 nvme") as nvme:
        viommu_lab.watch(nvme.guest)
        nvme.make_file_system()
        nvme.run("cp -r /usr/lib/python3.13/json /mnt && umount /mnt && rmmod nvme")
        assert nvme.run(f"ls {DISK} || echo gone").endswith("gone\n")
        nvme.run("modprobe nvme")
        nvme.await_disk()
        nvme.run(f"mount -t ext4 {DISK} /mnt && diff -r /usr/lib/python3.13/json /mnt/json")
        with nvme.rig.serving.trace("NvmeStateChanged") as trace:
            states = [each["state"] for each in trace.read()]
    assert states[-4:] == ["ready", "shut down", "disabled", "ready"], "firmware may have used it"


def test_the_root_is_on_the_disk(
    nvme: NvmeRig, assets: Assets, tmp_path: Path, viommu_lab: Lab
) -> None:
    """A driver that is built in probes before any user space. So nobody has bound the SMMU's driver."""
    nvme.make_file_system()
    nvme.run(
        "cd /mnt && mkdir -p usr/bin dev proc root run sys tmp && cp -a /bin /init . && "
        "cp /usr/bin/busybox usr/bin && cd / && umount /mnt"
    )
    shutil.copy(nvme.image, tmp_path)
    root = "rdinit=/none root=/dev/nvme0n1 rootfstype=ext4 rootwait rw init=/init"
    with NvmeRig(nvme.machine, assets, tmp_path, smmu=False, command_line=root) as again:
        viommu_lab.watch(again.guest)
        assert "/dev/root / ext4 rw" in again.run("cat /proc/mounts")
        again.run("cp /usr/bin/busybox /there && sync && cmp /usr/bin/busybox /there")


def test_what_was_not_flushed(nvme: NvmeRig) -> None:
    """The disk's write cache is volatile: what a cut would leave is what the file has."""
    assert nvme.disk(f"fill {DISK} 4") == {"written": 4}
    assert nvme.disk(f"forget {DISK} 4") == {"written": 4}
    assert nvme.disk(f"check {DISK} 4") == {"wrong": [0, 1, 2, 3]}, "the guest sees its zeros"
    with nvme.image.open("rb") as file:
        assert file.read(4 * MIB) == b"".join(pattern(number, MIB) for number in range(4))


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_file_system_that_does_not_flush(nvme: NvmeRig, barrier: int) -> None:
    """Then fsync is a promise that a cut would break: the file is as it was before all of it.

    The thread that zeroes inode tables some seconds after a mount would flush, whatever that says of barriers.
    """
    nvme.make_file_system()
    nvme.run("umount /mnt")
    before = nvme.digest()
    nvme.run(
        f"mount -t ext4 -o noinit_itable,barrier={barrier} {DISK} /mnt && cd /mnt && "
        "python3 /viommu/inside/records.py write . 2>/dev/null | head -n 5"
    )
    assert (nvme.digest() == before) == (not barrier)
    nvme.run("umount /mnt")


@pytest.mark.parametrize("machine", MACHINES)
def test_the_power_is_cut_under_load(
    machine: str, assets: Assets, tmp_path: Path, viommu_lab: Lab
) -> None:
    """Of the machine and its disk; what the guest was told is durable is there in the next machine."""
    with NvmeRig(machine, assets, tmp_path, volatile=True) as nvme:
        viommu_lab.watch(nvme.guest)
        nvme.make_file_system()
        durable = nvme.write_records(40, then=nvme.cut_power)
    with NvmeRig(machine, assets, tmp_path, volatile=True) as again:
        viommu_lab.watch(again.guest)
        assert again.judge_records(durable) == {"wrong": []}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_server_is_killed_under_load(
    machine: str, assets: Assets, tmp_path: Path, viommu_lab: Lab
) -> None:
    """Another takes over what was made to last. Without an SMMU's driver, for that died too."""
    # With the pin: QEMU 11.1 aborts when the vectors of MSI-X are freed and the server is gone.
    with NvmeRig(machine, assets, tmp_path, smmu=False, volatile=True, msix=False) as nvme:
        viommu_lab.watch(nvme.guest)
        nvme.make_file_system()
        durable = nvme.write_records(40, then=nvme.kill_server)
        nvme.run("umount /mnt")
        nvme.unplug()
        socket = {"type": "unix", "path": str(nvme.serve_again())}
        nvme.guest.qmp(
            "device_add", driver="vfio-user-pci", id="nvme0", bus="nvme0-port", socket=socket
        )
        nvme.await_disk()
        assert nvme.judge_records(durable) == {"wrong": []}

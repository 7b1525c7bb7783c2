"""The stock NVMe driver behind an SMMU: our controller and SMMU, against QEMU's own of both."""

import json
import tempfile
from pathlib import Path
from statistics import median

from viommu.lab.assets import Assets
from viommu.lab.config import load_machine, machine_directory, scripts_directory
from viommu.lab.guest import Guest
from viommu.lab.rig import Rig

MACHINE = "aarch64-nvme"
SIZE_MIB = 256
# Domains that translate, as the driver chooses them: it gathers invalidations.
_DOMAINS = "iommu.passthrough=0 iommu.strict=0"
ROUNDS = 5


def rates() -> dict[str, tuple[float, float, float]]:
    """Ours, QEMU's, and the ratio, by what is done: MiB/s ("write", "read"), commands a second ("random write", …).

    Both disks are files, in the same slot of the same guest. The guests are there at the same time and take turns, for
    the pace of a machine changes; medians over the rounds, of the ratio too.
    """
    assets = Assets.load()
    scripts = scripts_directory()
    with tempfile.TemporaryDirectory(prefix="viommu-bench-") as name:
        directory = Path(name)
        path = directory / "machine.toml"
        text = (machine_directory() / f"{MACHINE}.toml").read_text("utf-8")
        path.write_text(f'{text}disk = "ours.raw"\n', "utf-8")
        machine = load_machine(MACHINE)
        own = f"{machine.machine},iommu=smmuv3"
        machine = machine.model_copy(update={"machine": own, "devices": ()})
        image = directory / "qemu.raw"
        with image.open("wb") as file:
            file.truncate(SIZE_MIB << 20)
        disk = ("-drive", f"if=none,id=disk,format=raw,file={image}")
        more = (*disk, "-device", "nvme,serial=qemu,drive=disk,addr=0x2")
        with (
            Rig(
                path, assets=assets, linux_driver=True, scripts=scripts, command_line=_DOMAINS
            ) as ours,
            Guest(
                machine, assets, scripts=scripts, qemu_arguments=more, command_line=_DOMAINS
            ) as qemu,
        ):
            rounds = [(_measure(ours.guest), _measure(qemu)) for _ in range(ROUNDS)]
    return {
        what: (
            median(mine[what] for mine, _ in rounds),
            median(rival[what] for _, rival in rounds),
            median(mine[what] / rival[what] for mine, rival in rounds),
        )
        for what in rounds[0][0]
    }


def _measure(guest: Guest) -> dict[str, float]:
    disk = "/dev/nvme0n1"
    guest.check(f"until [ -b {disk} ]; do sleep 0.1; done")
    output = guest.python(f"/viommu/inside/bench_disk.py {disk}", timeout=240)
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found

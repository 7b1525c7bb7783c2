"""The benchmarks. Ratios compare two sides that do the same work in the same run; medians of several rounds."""

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

from rich.console import Console
from rich.table import Table
from scripts import bench_guest, bench_host, bench_nvme, bench_points

from viommu import hot
from viommu.driver.access import Poll
from viommu.driver.arena import Arena
from viommu.driver.smmu import SmmuDriver
from viommu.endpoints.pattern import PIECE
from viommu.endpoints.port import DmaPort
from viommu.host.smmu import ModelRegisters
from viommu.lab.assets import Assets
from viommu.lab.errors import LabError
from viommu.lab.serving import Serving
from viommu.memory import GuestMemory
from viommu.smmu import Access, Smmu
from viommu.trace import Tracer

HERE = Path(__file__).parent
MIB = 1 << 20
RAM_BASE = 0x4000_0000
RAM_SIZE = 256 * MIB
DMA_SIZE = 64 * MIB
DATA = RAM_BASE + 128 * MIB
STREAM = 0x10
ROUNDS = 5


@dataclass(frozen=True)
class Result:
    """`value` in `unit`; where there is a rival, `rival` in the same unit, and `ratio` with what it should be."""

    name: str
    value: float
    unit: str
    rival_name: str = ""
    rival: float | None = None
    ratio: float | None = None
    target: str = ""
    reached: bool | None = None


# MMIO: our server, and two C servers with the same library


def measure_mmio() -> list[Result]:
    """A 4-byte read, one at a time, by one C client. All on one CPU: across CPUs the wake-ups are what is measured."""
    with tempfile.TemporaryDirectory(prefix="viommu-bench-") as name:
        directory = Path(name)
        server, client = _compile(directory)
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cpus)})
        try:
            figures: dict[str, list[float]] = {"ours": [], "loop": [], "blocking": []}
            for _ in range(3):
                with Serving("aarch64-virt") as serving:
                    figures["ours"].append(_round_trip(client, serving.sockets["smmu"]))
                for kind in ("loop", "blocking"):
                    path = directory / f"{kind}.sock"
                    path.unlink(missing_ok=True)
                    argv = [str(server), str(path), *(["poll"] if kind == "loop" else [])]
                    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
                        figures[kind].append(_round_trip(client, path))
                        process.terminate()
        finally:
            os.sched_setaffinity(0, cpus)
    ours, loop, blocking = (median(figures[kind]) for kind in ("ours", "loop", "blocking"))
    return [
        Result(
            "MMIO read of IDR0, round trip",
            ours,
            "µs",
            "C, event loop",
            loop,
            ours / loop,
            "≤ 1.5",
            ours / loop <= 1.5,
        ),
        Result(
            "MMIO read of IDR0, round trip",
            ours,
            "µs",
            "C, blocking",
            blocking,
            ours / blocking,
            "≤ 1.5",
            ours / blocking <= 1.5,
        ),
    ]


def _compile(directory: Path) -> tuple[Path, Path]:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise SystemExit(
            "scripts/bench: no C compiler for the rival servers (sudo apt-get install gcc)"
        )
    library = Assets.load().libvfio_user.path
    include = library.parents[1] / "include" / "vfio-user"
    server, client = directory / "server", directory / "client"
    link = [f"-L{library.parent}", "-lvfio-user", f"-Wl,-rpath,{library.parent}"]
    include_flags = [f"-I{include}"] if include.is_dir() else ["-I/usr/include/vfio-user"]
    subprocess.run(
        [compiler, "-O2", *include_flags, "-o", server, HERE / "bench_mmio_server.c", *link],
        check=True,
    )
    subprocess.run([compiler, "-O2", "-o", client, HERE / "bench_mmio_client.c"], check=True)
    return server, client


def _round_trip(client: Path, socket: Path) -> float:
    """Microseconds."""
    done = subprocess.run(
        [client, socket, "20000"], check=True, capture_output=True, text=True, timeout=60
    )
    return float(json.loads(done.stdout)["median_ns"]) / 1000


# DMA and translation: the model in this process, over memory that stands for guest RAM


class Bench:
    """An SMMU, its driver, a port, and 64 MiB mapped twice: as 4 KiB pages in random order and as 2 MiB blocks."""

    scattered = 0x1_0000_0000
    blocks = 0x2_0000_0000

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.ram = memoryview(mmap.mmap(-1, RAM_SIZE))
        memory = GuestMemory()
        memory.add_region(RAM_BASE, RAM_SIZE, self.ram)
        self.smmu = Smmu(memory, tracer=tracer)
        arena = Arena([(RAM_BASE, self.ram[: DATA - RAM_BASE])])
        self.driver = SmmuDriver(ModelRegisters(self.smmu), arena, Poll(relax=self._step))
        self.driver.reset()
        self.domain = self.driver.create_domain()
        frames = list(range(DATA, DATA + DMA_SIZE, 4096))
        Random(1).shuffle(frames)  # noqa: S311 - a benchmark repeats itself
        self.domain.map_pages(self.scattered, frames)
        self.domain.map(self.blocks, DATA, DMA_SIZE)
        self.driver.attach(STREAM, self.domain)
        self.memory = memory
        self.port = self.new_port()
        self.data = self.ram[DATA - RAM_BASE : DATA - RAM_BASE + DMA_SIZE]
        self.buffer = memoryview(bytearray(os.urandom(MIB) * (DMA_SIZE // MIB)))

    def _step(self) -> None:
        self.smmu.step()

    def new_port(self) -> DmaPort:
        port = DmaPort(self.memory, STREAM, self.smmu)
        port.bus_master = True
        return port

    def dma(
        self,
        iova: int,
        *,
        write: bool,
        port: DmaPort | None = None,
        size: int = DMA_SIZE,
        piece: int = DMA_SIZE,
    ) -> None:
        """Move `size` bytes by transactions of at most `piece`."""
        port, done = port or self.port, 0
        while done < size:
            with port.begin(iova + done, min(piece, size - done), write=write) as transfer:
                part = self.buffer[done : done + transfer.size]
                if write:
                    transfer.write_from(part)
                else:
                    transfer.read_into(part)
                done += transfer.size

    def forget(self) -> None:
        """Empty the TLB, as a driver does."""
        self.domain.flush()


def measure_dma(bench: Bench) -> list[Result]:
    def move_in() -> None:
        bench.data[:] = bench.buffer

    def move_out() -> None:
        bench.buffer[:] = bench.data

    def translated(iova: int, write: bool) -> Callable[[], None]:
        return lambda: bench.dma(iova, write=write)

    results = []
    for name, iova, target in (
        ("4 KiB pages, scattered", bench.scattered, 0.4),
        ("2 MiB blocks", bench.blocks, 0.9),
    ):
        for write in (True, False):
            plain = move_in if write else move_out
            dma = translated(iova, write)
            pairs = [(_seconds(plain), _seconds(dma)) for _ in range(ROUNDS + 2)][2:]
            plain_rate = DMA_SIZE / median(pair[0] for pair in pairs) / 1e9
            dma_rate = DMA_SIZE / median(pair[1] for pair in pairs) / 1e9
            ratio = median(pair[0] / pair[1] for pair in pairs)
            what = f"DMA {'write' if write else 'read'}, {name}"
            results.append(
                Result(
                    what,
                    dma_rate,
                    "GB/s",
                    "memmove",
                    plain_rate,
                    ratio,
                    f"≥ {target}",
                    ratio >= target,
                )
            )
    # The same with every translation walked anew.
    plain_time = median(_seconds(move_in) for _ in range(ROUNDS))
    cold = []
    for _ in range(ROUNDS):
        bench.forget()
        cold.append(_seconds(translated(bench.scattered, True)))
    cold_time = median(cold)
    results.append(
        Result(
            "DMA write, 4 KiB pages, scattered, TLB empty", DMA_SIZE / cold_time / 1e9, "GB/s",
            "memmove", DMA_SIZE / plain_time / 1e9, plain_time / cold_time, "≥ 0.4", plain_time / cold_time >= 0.4,
        )
    )  # fmt: skip
    return results


def measure_points() -> list[Result]:
    """The share of a DMA, and of an invalidation, that goes into points at which no plan interferes."""
    data = bytes(4096)

    def dma(tracer: Tracer) -> Callable[[], None]:
        port = Bench(tracer).port

        def call() -> None:
            with port.begin(Bench.scattered, 4096, write=True) as transfer:
                transfer.write_from(data)

        return call

    def invalidation(tracer: Tracer) -> Callable[[], None]:
        return Bench(tracer).forget

    results = []
    for what, work in (("DMA write of 4 KiB", dma), ("TLBI and CMD_SYNC", invalidation)):
        whole, part, ratio = bench_points.share(work)
        results.append(
            Result(
                f"fault points without a plan, of a {what}", part, "µs", "the whole", whole,
                ratio, "≤ 0.05", ratio <= 0.05,
            )
        )  # fmt: skip
    return results


def measure_host(bench: Bench) -> list[Result]:
    """A port that the host SMMU stands behind, against one that it does not."""
    results = []
    for name, iova, piece in (
        ("4 KiB pages, scattered", bench.scattered, PIECE),
        ("2 MiB blocks", bench.blocks, PIECE),
        ("2 MiB blocks, 4 KiB at a time", bench.blocks, 4096),
    ):
        dma = partial(bench.dma, iova, write=True, size=4 * MIB, piece=piece)
        figures = bench_host.host_ratios(
            bench.port, bench.new_port(), lambda port, dma=dma: dma(port=port), 2 << 30
        )
        for state, (without, behind, ratio) in figures.items():
            free = state == "at pass-through"
            what = f"DMA write, {name}, host SMMU {state}"
            rate, rival = 4 * MIB / behind / 1e9, 4 * MIB / without / 1e9
            target, reached = ("≥ 0.98", ratio >= 0.98) if free else ("", None)
            results.append(
                Result(what, rate, "GB/s", "no host SMMU", rival, ratio, target, reached)
            )
    return results


def measure_translation(bench: Bench) -> list[Result]:
    access = Access(STREAM)
    smmu = bench.smmu

    def cached(count: int) -> None:
        for index in range(count):
            smmu.retire(smmu.translate(access, bench.scattered + (index * 4096) % DMA_SIZE, 64))

    def uncached(count: int) -> None:
        for index in range(count):
            smmu.tlb.invalidate_all()
            smmu.retire(smmu.translate(access, bench.scattered + (index * 4096) % DMA_SIZE, 64))

    def calls(count: int) -> None:
        memory = bench.port.memory
        for index in range(count):
            memory.load_u64(DATA + (index * 4096) % DMA_SIZE)

    cached_rate = _rate(cached, 40_000)
    load_rate = _rate(calls, 40_000)
    uncached_rate = _rate(uncached, 10_000)
    return [
        Result(
            "translations from the TLB",
            cached_rate,
            "/s",
            "one 8-byte load of guest RAM",
            load_rate,
            cached_rate / load_rate,
        ),
        Result(
            "translations walked (4 levels)",
            uncached_rate,
            "/s",
            "from the TLB",
            cached_rate,
            uncached_rate / cached_rate,
        ),
    ]


def measure_attach(bench: Bench) -> list[Result]:
    def cycles(count: int) -> None:
        for _ in range(count):
            bench.driver.attach(STREAM + 1, bench.domain)
            bench.driver.detach(STREAM + 1)

    return [Result("attach + detach, driver against model", _rate(cycles, 500), "/s")]


def measure_guest(bench: Bench) -> list[Result]:
    """What the stock driver does with our SMMU, against QEMU's in-process SMMUv3 in the same guest."""
    times = bench_guest.attach_times()
    results = []
    for knob, what in (
        ("vfio", "stock driver: VFIO open + close"),
        ("flip", "stock driver: group to identity and back"),
    ):
        ours, rival = times["ours"][knob], times["qemu"][knob]
        ratio = ours / rival
        results.append(
            Result(what, ours, "ms", "QEMU's own SMMUv3", rival, ratio, "≤ 1.5", ratio <= 1.5)
        )

    def copy() -> None:
        bench.data[:] = bench.buffer
        bench.buffer[:] = bench.data

    rate = DMA_SIZE / bench_guest.vfio_copy_seconds() / 1e9
    plain = DMA_SIZE / median(_seconds(copy) for _ in range(ROUNDS)) / 1e9
    name = "stock driver: copy of 64 MiB, VFIO, 4 KiB pages"
    results.append(Result(name, rate, "GB/s", "memmove there and back", plain, rate / plain))
    return results


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_nvme() -> list[Result]:
    """The stock NVMe driver, SMMU translating, against QEMU's own controller behind its own SMMUv3."""
    rates = bench_nvme.rates()
    results = []
    for what, unit in (
        ("write", "MiB/s"),
        ("read", "MiB/s"),
        ("random write", "/s"),
        ("random read", "/s"),
    ):
        ours, rival, ratio = rates[what]
        name = f"stock NVMe driver: {what}, {'4 KiB' if unit == '/s' else '1 MiB'}"
        results.append(
            Result(name, ours, unit, "QEMU's own nvme", rival, ratio, "≥ 0.8", ratio >= 0.8)
        )
    return results


def _rate(work: Callable[[int], None], count: int) -> float:
    work(count // 10)
    return count / median(_seconds(lambda: work(count)) for _ in range(3))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args()
    if not hot.COMPILED:
        print(
            "scripts/bench: the C extension is not built; the Python loops are measured",
            file=sys.stderr,
        )
    try:
        results = measure_mmio()
    except LabError as error:
        print(f"scripts/bench: {error}", file=sys.stderr)
        return 1
    bench = Bench()
    results += (
        measure_dma(bench)
        + measure_host(bench)
        + measure_points()
        + measure_translation(bench)
        + measure_attach(bench)
    )
    results += measure_guest(bench) + measure_nvme()
    if options.json:
        print(json.dumps({"compiled": hot.COMPILED, "results": [asdict(r) for r in results]}))
        return 0
    table = Table("what", "measured", "compared with", "", "ratio", "target", title="viommu bench")
    for r in results:
        table.add_row(
            r.name,
            f"{r.value:,.2f} {r.unit}" if r.value < 1000 else f"{r.value:,.0f} {r.unit}",
            r.rival_name,
            "" if r.rival is None else f"{r.rival:,.2f}" if r.rival < 1000 else f"{r.rival:,.0f}",
            "" if r.ratio is None else f"{r.ratio:.2f}",
            r.target,
            style=None if r.reached is None else "green" if r.reached else "red",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

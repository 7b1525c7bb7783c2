"""What the host SMMU costs the DMA of a port behind the guest's SMMU."""

import time
from collections.abc import Callable
from statistics import median

from viommu.endpoints.port import DmaPort
from viommu.host.smmu import HostSmmu
from viommu.trace import Tracer

ROUNDS = 100


def host_ratios(
    plain: DmaPort, behind: DmaPort, dma: Callable[[DmaPort], None], limit: int
) -> dict[str, tuple[float, float, float]]:
    """Seconds of `dma` without the host SMMU and with it, and the ratio; at pass-through, and 1:1 below `limit`.

    `plain` is a port that no host SMMU ever stood behind; `behind` is put behind one here, and let go.
    """
    host = HostSmmu({"port": behind}, lambda: None, Tracer())
    domain = host.driver.create_domain()
    domain.map(0, 0, limit)
    host.concern(behind)
    host.driver.attach(behind.stream_id, domain)
    mapping = _compared(plain, behind, dma)
    host.release(behind)
    return {"at pass-through": _compared(plain, behind, dma), "mapping 1:1": mapping}


def _compared(
    plain: DmaPort, behind: DmaPort, dma: Callable[[DmaPort], None]
) -> tuple[float, float, float]:
    pairs = []
    for turn in range(ROUNDS):
        # In turn: what runs first finds the caches of the CPU as the other left them.
        first, second = (plain, behind) if turn % 2 else (behind, plain)
        seconds = {port: _seconds(dma, port) for port in (first, second)}
        pairs.append((seconds[plain], seconds[behind]))
    return (
        median(pair[0] for pair in pairs),
        median(pair[1] for pair in pairs),
        median(pair[0] / pair[1] for pair in pairs),
    )


def _seconds(dma: Callable[[DmaPort], None], port: DmaPort) -> float:
    start = time.perf_counter()
    dma(port)
    return time.perf_counter() - start

"""Runs cases of `inside/raw.py` in a guest whose SMMU has no other driver, and reads their results."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from viommu.lab.rig import Rig

Result = dict[str, Any]
Case = Callable[[str], Result]


def results(rig: Rig, arguments: str, timeout: float = 120) -> Iterator[Result]:
    """The results of `raw.py arguments`, which may take `timeout` seconds."""
    output = rig.guest.python(f"/viommu/inside/raw.py {arguments}", timeout=timeout)
    return (json.loads(line) for line in output.splitlines() if line.startswith('{"case"'))


class RawCases:
    """What has been run in each guest, by the guest's process and the case."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], Result] = {}

    def get(self, rig: Rig, name: str) -> Result:
        """The result of `group/name`. A group runs as a whole, in one process, when one of it is asked for."""
        key = rig.guest.pid, name
        if key not in self._seen:
            for line in results(rig, name.split("/")[0]):
                self._seen[rig.guest.pid, line["case"]] = line
        assert key in self._seen, f"the guest ran no case {name}"
        assert "error" not in self._seen[key], self._seen[key]["error"]
        return self._seen[key]

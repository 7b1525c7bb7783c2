"""Runs one group of cases, or some cases of it, and prints the result of each as one line of JSON.

    python3 raw.py GROUP [CASE ...]

The process is the only driver of the SMMU; every case begins by resetting it. A case reports what it saw and
judges nothing: that is the business of the test that called it.
"""

import json
import sys
from time import monotonic

from board import Board


def main(group: str, wanted: list[str]) -> None:
    # Only the group's own module: imports are slow here.
    module = __import__(f"raw_{group}")
    board = Board()
    board.prepare(module.DATA_SIZE)
    for name, case in module.CASES.items():
        if wanted and name not in wanted:
            continue
        started = monotonic()
        try:
            result = case(board)
        except Exception:
            import traceback

            result = {"error": traceback.format_exc()}
        seconds = round(monotonic() - started, 3)
        # The console mixes in the kernel's messages: a result begins where nothing else does.
        print("\n" + json.dumps({"case": f"{group}/{name}", "seconds": seconds, **result}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

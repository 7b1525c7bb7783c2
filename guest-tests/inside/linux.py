"""Runs one group of cases, or some cases of it, while the guest's kernel drives the SMMU; one line of JSON each.

    python3 linux.py GROUP [CASE ...]

A case reports what it saw and judges nothing: that is the business of the test that called it. After one that failed
the rest is not run: what it left open is closed when the process ends.
"""

import json
import sys
from time import monotonic


def main(group: str, wanted: list[str]) -> None:
    # Only the group's own module: imports are slow here.
    module = __import__(f"linux_{group}")
    for name, case in module.CASES.items():
        if wanted and name not in wanted:
            continue
        started = monotonic()
        try:
            result = case()
        except Exception:
            import traceback

            result = {"error": traceback.format_exc()}
        seconds = round(monotonic() - started, 3)
        # The console mixes in the kernel's messages: a result begins where nothing else does.
        print("\n" + json.dumps({"case": f"{group}/{name}", "seconds": seconds, **result}))
        if "error" in result:
            return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

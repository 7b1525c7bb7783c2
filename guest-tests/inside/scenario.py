"""What a scenario's script tells: its steps, and the facts that it found, a line of JSON each."""

import json


def step(what: str, **facts: object) -> None:
    """Something was done, and this came of it."""
    # The console mixes in the kernel's messages: a line begins where nothing else does.
    print("\n" + json.dumps({"step": what, "facts": facts}), flush=True)

"""What a scenario's script tells: its steps, and the facts that it found, a line of JSON each."""

import json


def step(what: str, **facts: object) -> None:
    """Something was done, and this came of it."""
    found = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in facts.items()
    }
    # The console mixes in the kernel's messages: a line begins where nothing else does.
    print("\n" + json.dumps({"step": what, "facts": found}), flush=True)

"""`exec` a program that cannot outlive the process that asked for it.

Run as a script: `python -I -S exec_bound.py PARENT_PID SIGNAL PROGRAM ARGUMENT…`. The kernel sends
the program that signal when the thread that started it ends, be it by `kill -9`.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, death_signal, *argv = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0):
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    # The parent may have died before the kernel knew our wish.
    if os.getppid() != int(parent):
        sys.exit("the parent process is gone")
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - no shell is the point
    except OSError as error:
        sys.exit(f"{argv[0]}: {error.strerror}")


if __name__ == "__main__":
    main()

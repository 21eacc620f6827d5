"""Which process something on disk belongs to, and whether it still runs."""

import os
import socket
import sys

from flax_ckpt.storage import files


def identity(pid: int) -> str:
    """Host and number of a running process; on Linux its start too, as numbers are given again."""
    started = ""
    try:
        if sys.platform == "linux":
            stat = files.read(f"/proc/{pid}/stat").decode(errors="replace")
            started = stat.rpartition(")")[2].split()[19]  # field 22 of proc(5)
        else:
            os.kill(pid, 0)
    except PermissionError:
        pass  # another user's
    except OSError:
        return ""
    return f"{socket.gethostname()} {pid} {started}"


def running(text: str) -> tuple[str, int] | None:
    """Host and number of the process of that identity; None if it has ended.

    One of another host counts as running: nothing is known of it.
    """
    try:
        host, pid = text.split()[:2]
        ended = is_here(host) and text != identity(int(pid))
        return None if ended else (host, int(pid))
    except ValueError:
        return None


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    return host == socket.gethostname()

"""Print whether another program uses the rendezvous port of this host: `python -m ddp_cifar.distributed.ports HOST:PORT`.

torchrun would take that program for the rendezvous, and wait for minutes.
"""

import contextlib
import errno
import socket
import sys
from pathlib import Path

LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp (Linux, Documentation/networking/proc_net_tcp.rst)."""


def taken_port(head: str) -> str:
    """Return a message if a program other than torchrun listens on HOST:PORT of this host, or else ""."""
    host, _, port = head.rpartition(":")
    if not port.isdigit():
        return ""
    for family, _, _, _, address in _addresses(host.strip("[]"), int(port)):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and not _is_torchruns(int(port)):
                    return f"another program uses port {port} of {socket.gethostname()}: choose another port in HEAD={head}"
    return ""


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int]]]:
    with contextlib.suppress(OSError):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]
    return []


def _is_torchruns(port: int) -> bool:
    """True if torchrun, a process of this user, listens on the port: another agent of the run on this host."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if inodes & {str(file.readlink()) for file in (process / "fd").iterdir()}:
                return b"torchrun" in (process / "cmdline").read_bytes()
    return False


if __name__ == "__main__":
    if message := taken_port(sys.argv[1]):
        print(message)
        sys.exit(1)

"""Ports that ranks and nodes meet on."""

import socket

# Below the range from which Linux takes the ports of outgoing connections, one of which could come in between.
_PORTS = range(20_000, 32_000)
_APART = 97  # ports between those of two jobs with consecutive numbers, which may start on one host at the same moment


def any_free_port() -> int:
    """One of this host on which nothing listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def port_of_job(job_id: int) -> int:
    """One that all nodes of a Slurm job compute alike, far from those of the jobs beside it."""
    return _PORTS[_APART * job_id % len(_PORTS)]


def free_port_of_job(job_id: int) -> int:
    """The first from ``port_of_job`` on, in a circle, on which nothing listens on this host."""
    start = _PORTS.index(port_of_job(job_id))
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:  # taken
                continue
            return port
    raise RuntimeError(f"no free port among {_PORTS}")

"""TCP ports on which ranks and nodes connect to the master."""

import socket

# Below the range that Linux uses for outgoing connections, one of which could take the port in the meantime.
_PORTS = range(20_000, 32_000)
_APART = 97  # distance of the ports of jobs with consecutive ids, which may start on one host at the same time


def any_free_port() -> int:
    """A port of this host on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def port_of_job(job_id: int) -> int:
    """The port that all nodes of a Slurm job compute from its id, far from those of jobs with similar ids."""
    return _PORTS[_APART * job_id % len(_PORTS)]


def free_port_of_job(job_id: int) -> int:
    """The first port, counted from ``port_of_job`` and wrapping around, on which nothing listens on this host."""
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

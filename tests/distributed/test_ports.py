"""Ports that nobody else takes."""

import itertools
import socket

from qvtune.distributed.ports import any_free_port, free_port_of_job, port_of_job


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", any_free_port()))


def test_jobs_have_ports_of_their_own_far_from_those_beside_them() -> None:
    ports = [port_of_job(job) for job in range(12_000)]
    assert sorted(ports) == list(range(20_000, 32_000))
    assert min(abs(one - other) for one, other in itertools.pairwise(ports)) == 97


def test_a_port_that_is_taken_is_not_free() -> None:
    first = free_port_of_job(7)
    with socket.socket() as server:
        server.bind(("", first))
        server.listen()
        assert free_port_of_job(7) == first + 1


def test_the_search_begins_again_at_the_start() -> None:
    job = next(job for job in range(12_000) if port_of_job(job) == 31_999)
    with socket.socket() as server:
        server.bind(("", 31_999))
        server.listen()
        assert 20_000 <= free_port_of_job(job) < 31_999

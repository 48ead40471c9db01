"""slurm/train.sbatch: hosts, networks, daemons and ranks that die."""

from collections.abc import Iterator

import pytest

from qvtune.checkpoint.folder import newest
from tests.slurm.cluster import HOSTS, LOGIN, Job, wait_until
from tests.slurm.site import MAX_STEPS, SAVE_EVERY, Site
from tests.slurm.test_train import RANK, restarted
from tests.support.lab import flip_a_bit

pytestmark = pytest.mark.timeout(1200)  # every wait in here has a limit of its own


@pytest.fixture(autouse=True)
def _healthy_afterwards(site: Site) -> Iterator[None]:
    yield
    site.cluster.wait_idle(*HOSTS, timeout=120)


def train_until_saved(site: Site, name: str) -> Job:
    """A job on two of all hosts, at a step with a checkpoint behind it."""
    return site.wait_for_step(site.train(name, options=("--partition=all",)), name, SAVE_EVERY + 1)


def test_a_job_whose_hosts_crash_finishes_on_others(site: Site) -> None:
    """First the host of rank 1, then, one checkpoint later, the one with the batch script and rank 0.

    The second crash also damages the newest checkpoint: the job goes on from the one before.
    """
    name = "crashed"
    job = train_until_saved(site, name)
    site.cluster.crash(peer := job.hosts[1])
    job = site.wait_for_step(job.id, name, 2 * SAVE_EVERY + 1)
    assert job.restarts == 1 and peer not in job.hosts, job.story
    site.cluster.crash(batch_host := job.hosts[0])
    damaged = newest(site.lab.run_dir(name) / "checkpoints")
    assert damaged is not None
    flip_a_bit(damaged / "optimizer.safetensors")
    done = site.cluster.wait(job.id, timeout=400)
    for host in (peer, batch_host):
        site.cluster.boot(host)
    restarted(done, times=2)
    assert not {peer, batch_host} & set(done.hosts)
    last = site.lab.events(name, "run_start")[-1]
    assert last["damaged_checkpoints"] == [f"{damaged.name}.damaged"]
    assert damaged.name == f"step-{last['step'] + SAVE_EVERY:08d}"
    assert site.losses(name) == site.reference(2)


def test_a_job_whose_network_is_cut_names_the_host_and_finishes(site: Site) -> None:
    """The collective's timeout is the only one that notices: Slurm's own is far away."""
    name = "cut"
    with site.cluster.slurmd_timeout(3600):  # changed while there is no job: Slurm 22.05 would lose track of its GPUs
        job = site.train(name, QVTUNE_TIMEOUT_SECONDS="60")
        lost = site.wait_for_step(job, name, SAVE_EVERY + 1).hosts[1]
        site.cluster.cut(lost)
        named = f"lost host: {lost}; it does not answer"
        site.cluster.wait_for_job(job, lambda now: named in now.log(), "ended by the timeout", timeout=240)
        site.cluster.heal(lost)
        done = site.cluster.wait(job, timeout=400)
    restarted(done, times=1)
    assert site.losses(name) == site.reference(2)


def test_a_job_with_a_rank_that_hangs_twice_finishes_without_its_host(site: Site) -> None:
    name = "hung"
    job = site.train(name, "train.hang_seconds=15", options=("--partition=all",))
    hosts = []
    for restarts in (0, 1):
        now = site.wait_for_step(job, name, (restarts + 1) * SAVE_EVERY + 1)
        hosts.append(now.hosts[1])
        *_, rank = site.cluster.pids(hosts[-1], RANK)
        site.cluster.kill(hosts[-1], "STOP", rank)
        wait_until(lambda: not site.cluster.pids(hosts[-1], RANK), "end of the rank that was stopped", timeout=60)
        again = restarts + 1
        site.cluster.wait_for_job(job, lambda now, it=again: now.restarts == it, "requeued", timeout=60)
    assert hosts[0] == hosts[1], "Slurm has used another host by itself"
    done = site.cluster.wait(job, timeout=400)
    restarted(done, times=2)
    assert done.log().count(f"rank 1 on {hosts[0]}: last seen at ") == 2, done.story
    assert "restart 0] exit code 76" in done.log() or "exit code 137" in done.log(), done.story
    assert f"as ranks have hung there twice: {hosts[0]}" in done.log(), done.story
    assert hosts[0] not in done.hosts
    assert site.losses(name) == site.reference(2)


def test_a_killed_rank_ends_the_job(site: Site) -> None:
    name = "killed"
    job = train_until_saved(site, name)
    host = job.hosts[1]
    *_, rank = site.cluster.pids(host, RANK)
    site.cluster.kill(host, "KILL", rank)
    done = site.cluster.wait(job.id, timeout=120)
    assert (done.state, done.code, done.restarts) == ("FAILED", 137, 0), done.story
    assert all(site.cluster.pids(host, RANK) == [] for host in job.hosts)
    assert max(site.steps(name)) < MAX_STEPS


def test_a_stale_rank_writes_nothing(site: Site) -> None:
    """slurmd alone dies: the ranks of the first start live on, paused until the second one is at work elsewhere."""
    name = "stale"
    options = ("--partition=all",)
    job = site.train(name, "train.hang_seconds=null", nodes=1, options=options, QVTUNE_PROCS_PER_NODE="2")
    (host,) = site.wait_for_step(job, name, SAVE_EVERY + 1).hosts
    ranks = site.cluster.pids(host, RANK)
    site.cluster.kill(host, "STOP", *ranks)
    site.cluster.kill_slurmd(host)
    # KillWait after it has heard of the node's failure, the first start's srun kills the job's step 0, whichever start
    # that belongs to. By default a requeued job waits longer than that (cred_expire: 120 s, here 10), here it is held.
    site.cluster.wait_for_job(job, lambda now: (now.restarts, now.state) == (1, "PENDING"), "requeued", timeout=120)
    site.cluster.run(LOGIN, "scontrol", "hold", job)
    site.cluster.wait_for_job(
        job, lambda now: "restart 0] exit code" in now.log(), "left by its first srun", timeout=120
    )
    site.cluster.run(LOGIN, "scontrol", "release", job)
    site.wait_for_step(job, name, SAVE_EVERY + 3)
    assert site.cluster.pids(host, RANK) == ranks
    assert site.cluster.pids(host, RANK) == ranks
    site.cluster.kill(host, "CONT", *ranks)
    done = site.cluster.wait(job, timeout=400)
    wait_until(lambda: not site.cluster.pids(host, RANK), "end of the stale ranks", timeout=120)
    site.cluster.start_slurmd(host)
    restarted(done, times=1)
    assert host not in done.hosts
    assert site.losses(name) == site.reference(2)
    assert site.steps(name).count(MAX_STEPS) == 1

"""slurm/train.sbatch: trained is what a local run trains, however often the job is stopped."""

import re

import pytest

from tests.slurm.cluster import LOGIN, Job, wait_until
from tests.slurm.site import MAX_STEPS, Site

pytestmark = pytest.mark.timeout(1200)  # every wait in here has a limit of its own

# Command lines; in brackets: not the one that holds this pattern.
LAUNCHER = r"[p]ython -u -m qvtune\.distributed\.node_launcher"
RANK = r"[p]ython -u \S*launch/train\.py --config"
LONG = 5 * MAX_STEPS  # of one rank, which is fast: it must not be done before Slurm has stopped it


def restarted(job: Job, times: int) -> None:
    """Done after so many restarts, all of which are in the log."""
    assert (job.state, job.code, job.restarts) == ("COMPLETED", 0, times), job.story
    starts = re.findall(rf"job {job.id} restart (\d+)\] on ", job.log())
    assert starts == [str(number) for number in range(times + 1)], job.story


def preempt(site: Site) -> None:
    """A job on both hosts of the partition ``low``, from which a job there has to go."""
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    site.cluster.sbatch(*options, "--wrap=true", cwd=site.home)


def test_three_hosts_train_what_local_processes_train(site: Site) -> None:
    name = "three hosts $(touch x) 'quoted'"
    done = site.cluster.wait(site.train(name, nodes=3), timeout=400)
    restarted(done, times=0)
    assert done.hosts == ("n1", "n2", "n3")
    # on one host the ranks' sums go through shared memory, in another order
    assert site.losses(name) == pytest.approx(site.reference(3), rel=1e-5)
    logs = site.lab.run_dir(name) / "logs"
    assert {path.name for path in logs.iterdir()} == {"rank-0.log", "rank-1.log", "rank-2.log"}
    assert f"step {MAX_STEPS}/{MAX_STEPS}" in (logs / "rank-0.log").read_text()
    assert " on n2" in (logs / "rank-1.log").read_text()
    assert not (site.home / "x").exists()


def test_a_job_that_is_asked_to_stop_goes_on_exactly(site: Site) -> None:
    """What Slurm does before the time limit: first while the ranks start, then while they train.

    They are started by programs that ignore the signal, and have no handler yet at first.
    """
    name = "usr1"
    job = site.train(name, "train.save_every=0")
    for host in ("n1", "n2"):
        wait_until(lambda host=host: site.cluster.pids(host, LAUNCHER), f"a launcher on {host}", timeout=120)
    site.cluster.scancel("--batch", "--signal=USR1", job)
    site.cluster.wait_for_job(job, lambda now: now.restarts == 1, "requeued", timeout=120)
    assert not (site.lab.run_dir(name) / "metrics.jsonl").exists(), "not a single step"

    site.wait_for_step(job, name, 3)
    site.cluster.scancel("--batch", "--signal=USR1", job)
    site.cluster.wait_for_job(job, lambda now: now.restarts == 2, "requeued again", timeout=120)
    saved = [entry["step"] for entry in site.lab.events(name, "checkpoint")]
    assert len(saved) == 1 and 3 <= saved[0] < MAX_STEPS

    done = site.cluster.wait(job, timeout=400)
    restarted(done, times=2)
    assert done.hosts == ("n1", "n2")
    assert "before the first step; there was nothing to save" in done.log(), done.story
    assert "restart 0] exit code 75" in done.log() and "restart 1] exit code 75" in done.log(), done.story
    assert site.losses(name) == site.reference(2)
    assert site.steps(name) == list(range(1, MAX_STEPS + 1))  # no step ran twice


def test_a_preempted_and_a_requeued_job_go_on_exactly_until_the_cap(site: Site) -> None:
    """Preempted, requeued and requeued again, which is more than it may; then the same command resumes."""
    name, max_steps = "again", LONG
    again = (name, f"train.max_steps={max_steps}")
    job = site.train(*again, nodes=1, options=("--partition=low",), QVTUNE_MAX_RESTARTS="2")
    site.wait_for_step(job, name, 1)
    preempt(site)
    for restarts in (1, 2):
        # running: until then ranks of the start before may still complete a step
        wanted = ("RUNNING", restarts)
        site.cluster.wait_for_job(job, lambda now, it=wanted: (now.state, now.restarts) == it, "restarted", timeout=200)
        site.wait_for_step(job, name, max(site.steps(name)) + 1)
        site.cluster.run(LOGIN, "scontrol", "requeue", job)
    capped = site.cluster.wait(job, timeout=200)
    assert (capped.state, capped.code, capped.restarts) == ("FAILED", 75, 3), capped.story
    assert "not restarted: it has been restarted 3 times, QVTUNE_MAX_RESTARTS is 2" in capped.log(), capped.story
    assert [entry["reason"] for entry in site.lab.events(name, "run_end")] == ["stopped"] * 3
    assert max(site.steps(name)) < max_steps

    done = site.cluster.wait(site.train(*again, nodes=1, options=("--partition=low",)), timeout=400)
    restarted(done, times=0)
    assert site.losses(name, max_steps) == site.reference(1, max_steps)
    assert site.steps(name) == list(range(1, max_steps + 1))


def test_a_cancelled_job_stays_cancelled(site: Site) -> None:
    job = site.train("cancelled", f"train.max_steps={LONG}", nodes=1)
    site.wait_for_step(job, "cancelled", 1)
    site.cluster.scancel(job)
    done = site.cluster.wait(job, timeout=120)
    assert (done.state, done.restarts) == ("CANCELLED", 0), done.story


def test_a_job_that_is_preempted_at_the_cap_stops(site: Site) -> None:
    options = ("--partition=low",)
    job = site.train("capped", f"train.max_steps={LONG}", nodes=1, options=options, QVTUNE_MAX_RESTARTS="0")
    site.wait_for_step(job, "capped", 1)
    preempt(site)
    done = site.cluster.wait(job, timeout=200)
    assert (done.state, done.code, done.restarts) == ("FAILED", 75, 0), done.story
    assert "not restarted: it has been restarted 0 times, QVTUNE_MAX_RESTARTS is 0" in done.log(), done.story


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "did you mean `optimizer.lr`"),
        ("checkpoint.resume=never", "checkpoint.resume: never; a requeued job would start from scratch"),
    ],
)
def test_a_wrong_recipe_ends_with_2(site: Site, override: str, message: str) -> None:
    job = site.train("wrong", override)
    done = site.cluster.wait(job, timeout=60)
    assert (done.state, done.code, done.restarts) == ("FAILED", 2, 0), done.story
    assert message in done.log(), done.story
    assert not site.lab.run_dir("wrong").exists()


def test_wrong_data_ends_with_2(site: Site) -> None:
    """Found by the ranks, of which the launcher and srun have to hand the code on."""
    job = site.train("no-data", "data.train=nowhere.jsonl")
    done = site.cluster.wait(job, timeout=400)
    assert (done.state, done.code, done.restarts) == ("FAILED", 2, 0), done.story
    assert done.log().count("\nerror: ") == 1 and "\nerror: data.train: cannot read nowhere.jsonl" in done.log(), (
        done.story
    )

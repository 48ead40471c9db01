"""slurm/train.sbatch: trained is what a local run trains, however often the job is stopped."""

import re
import time

import pytest

from tests.slurm.cluster import LOGIN, Job
from tests.slurm.site import MAX_STEPS, Site

pytestmark = pytest.mark.timeout(1200)  # every wait in here has a limit of its own


def restarted(job: Job, times: int) -> None:
    """Done after so many restarts, all of which are in the log."""
    assert (job.state, job.code, job.restarts) == ("COMPLETED", 0, times), job.story
    starts = re.findall(rf"job {job.id} restart (\d+)\] on ", job.log())
    assert starts == [str(number) for number in range(times + 1)], job.story


def test_two_hosts_train_what_local_processes_train(site: Site) -> None:
    name = "two hosts $(touch x) 'quoted'"
    done = site.cluster.wait(site.train(name), timeout=400)
    restarted(done, times=0)
    assert done.hosts == ("n1", "n2")
    assert site.losses(name) == site.reference(2)
    logs = site.lab.run_dir(name) / "logs"
    assert {path.name for path in logs.iterdir()} == {"hosts", "rank-0.log", "rank-1.log"}
    assert f"step {MAX_STEPS}/{MAX_STEPS}" in (logs / "rank-0.log").read_text()
    assert " on n2" in (logs / "rank-1.log").read_text()
    assert not (site.home / "x").exists()


def test_four_hosts_train_what_local_processes_train(site: Site) -> None:
    done = site.cluster.wait(site.train("four", nodes=4), timeout=400)
    restarted(done, times=0)
    # on one host the ranks' sums go through shared memory, in another order
    assert site.losses("four") == pytest.approx(site.reference(4), rel=1e-5)


def test_a_job_that_is_asked_to_stop_goes_on_exactly(site: Site) -> None:
    """What Slurm does before the time limit."""
    job = site.train("usr1", "train.save_every=0")
    site.wait_for_step(job, "usr1", 3)
    site.cluster.scancel("--batch", "--signal=USR1", job)
    site.cluster.wait_for_job(job, lambda now: now.restarts == 1, "requeued", timeout=120)
    saved = [entry["step"] for entry in site.lab.events("usr1", "checkpoint")]
    assert len(saved) == 1 and 3 <= saved[0] < MAX_STEPS
    done = site.cluster.wait(job, timeout=400)
    restarted(done, times=1)
    assert "restart 0] exit code 75" in done.log(), done.story
    assert site.losses("usr1") == site.reference(2)
    assert site.steps("usr1") == list(range(1, MAX_STEPS + 1))  # no step ran twice


def test_a_request_while_the_ranks_start_is_not_lost(site: Site) -> None:
    """They are started by programs that ignore the signal, and have no handler yet."""
    job = site.train("early")
    log = site.lab.run_dir("early") / "logs" / "hosts"
    site.cluster.wait_for_job(job, lambda now: log.exists(), "starting", timeout=120)
    time.sleep(3)  # srun has started the launchers, which import DeepSpeed
    site.cluster.scancel("--batch", "--signal=USR1", job)
    site.cluster.wait_for_job(job, lambda now: now.restarts == 1, "requeued", timeout=120)
    assert not (site.lab.run_dir("early") / "metrics.jsonl").exists(), "not a single step"
    done = site.cluster.wait(job, timeout=400)
    restarted(done, times=1)
    assert "before the first step; there was nothing to save" in done.log(), done.story
    assert site.losses("early") == site.reference(2)


def test_a_preempted_job_goes_on_exactly(site: Site) -> None:
    job = site.train("preempted", nodes=1, options=("--partition=low",))
    site.wait_for_step(job, "preempted", 3)
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    site.cluster.sbatch(*options, "--wrap=sleep 2", cwd=site.home)
    done = site.cluster.wait(job, timeout=400)
    restarted(done, times=1)
    assert site.losses("preempted") == site.reference(1)


def test_a_requeued_job_goes_on_exactly(site: Site) -> None:
    job = site.train("requeued", nodes=1)
    site.wait_for_step(job, "requeued", 3)
    site.cluster.run(LOGIN, "scontrol", "requeue", job)
    done = site.cluster.wait(job, timeout=400)
    restarted(done, times=1)
    assert site.losses("requeued") == site.reference(1)


def test_a_cancelled_job_stays_cancelled(site: Site) -> None:
    job = site.train("cancelled", nodes=1)
    site.wait_for_step(job, "cancelled", 1)
    site.cluster.scancel(job)
    done = site.cluster.wait(job, timeout=120)
    assert (done.state, done.restarts) == ("CANCELLED", 0), done.story


def test_a_job_that_is_preempted_again_and_again_stops_at_the_cap(site: Site) -> None:
    job = site.train("capped", nodes=1, options=("--partition=low",), QVTUNE_MAX_RESTARTS="0")
    site.wait_for_step(job, "capped", 1)
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    site.cluster.sbatch(*options, "--wrap=true", cwd=site.home)
    done = site.cluster.wait(job, timeout=200)
    assert (done.state, done.code, done.restarts) == ("FAILED", 75, 0), done.story
    assert "not restarted: it has been restarted 0 times, QVTUNE_MAX_RESTARTS is 0" in done.log(), done.story


def test_the_cap_holds_for_restarts_by_slurm_too(site: Site) -> None:
    job = site.train("capped-by-slurm", QVTUNE_MAX_RESTARTS="0")
    site.cluster.wait_for_job(job, lambda now: now.state == "RUNNING" and now.log(), "running", timeout=60)
    site.cluster.run(LOGIN, "scontrol", "requeue", job)
    done = site.cluster.wait(job, timeout=200)
    assert (done.state, done.code, done.restarts) == ("FAILED", 75, 1), done.story
    assert "not restarted: it has been restarted 1 times, QVTUNE_MAX_RESTARTS is 0" in done.log(), done.story
    record = site.lab.run_dir("capped-by-slurm/metrics.jsonl")
    assert not record.exists() or record.read_text().count("run_start") == 1  # the first start may have come so far


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

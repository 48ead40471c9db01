"""DeepSpeed's launcher for the ranks of one node, which ignores stop signals: slurm/node.sh starts it.

``python -m qvtune.distributed.node_launcher`` takes the arguments of ``deepspeed.launcher.launch``. Slurm signals every
process of a job step. The launcher alone would answer SIGTERM by ending with code 1, whatever its ranks return, and
SIGUSR1 would kill it. Here both are blocked, so it returns the code of the first rank that fails: 75 from ranks that
have stopped on request, -9 (247 for a shell) from a rank that was killed. Its ranks inherit the blocked signals, which
wait until ``qvtune.distributed.stop_signals`` handles them.
"""

import runpy
import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)

#!/bin/bash
# Starts one rank: rank.sh SCRIPT [ARGUMENT ...]. Its output is appended to a log per rank; that of rank 0 also goes to the
# output of the job.
set -u

log=$QVTUNE_LOGS/rank-$RANK.log
echo "--- $(date '+%F %T') job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME" >>"$log"
if ((RANK == 0)); then
    exec python -u "$@" > >(exec tee -a "$log") 2>&1 # exec: the rank stays the launcher's child, for signals and exit code
else
    exec python -u "$@" >>"$log" 2>&1
fi

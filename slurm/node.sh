#!/bin/bash
# One node's part of a job: node.sh SCRIPT [ARGUMENT ...] runs the script's ranks under DeepSpeed's launcher, as
# slurm/train.sbatch has arranged it (QVTUNE_* variables).
set -u

# As n1:0,1@n2:0,1. The launcher sets CUDA_VISIBLE_DEVICES from it: on this node to the devices that Slurm gave the job,
# by default 0, 1, ... Of the other nodes only the number counts.
devices() {
    local default given host
    default=$(seq -s , 0 $((QVTUNE_PROCS_PER_NODE - 1)))
    given=$(cut -d , -f "1-$QVTUNE_PROCS_PER_NODE" <<<"${CUDA_VISIBLE_DEVICES:-}")
    [[ $given =~ ^[0-9]+(,[0-9]+)*$ && $(tr , '\n' <<<"$given" | wc -l) == "$QVTUNE_PROCS_PER_NODE" ]] || given=$default
    for host in $QVTUNE_HOSTS; do
        if [[ $host == "$SLURMD_NODENAME" ]]; then echo "$host:$given"; else echo "$host:$default"; fi
    done | paste -s -d @
}

# Slurm signals every process of the step, and the ranks stop on request. SIGTERM would kill the outer process of the
# launcher, SIGUSR1 both; the inner one handles SIGTERM: it forwards it, waits, and returns 1 whatever the ranks return.
# Ranks that do not exist yet, or have no signal handler yet, read the request from the file when they start.
stop_folder=$(mktemp -d) || exit
trap 'rm -r "$stop_folder"' EXIT
export QVTUNE_STOP_FILE=$stop_folder/signal
asked=''
trap 'asked=yes; echo SIGTERM >"$QVTUNE_STOP_FILE"' TERM
trap 'asked=yes; echo SIGUSR1 >"$QVTUNE_STOP_FILE"' USR1
(
    trap '' TERM USR1
    exec deepspeed --hostfile "$QVTUNE_LOGS/hosts" --include "$(devices)" --no_ssh --node_rank "$SLURM_NODEID" \
        --master_addr "${QVTUNE_HOSTS%% *}" --master_port "$QVTUNE_MASTER_PORT" --log_level warning \
        --no_python --no_local_rank bash "${BASH_SOURCE%/*}/rank.sh" "$@"
) &
launcher=$!
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done # a signal ends `wait`, not the launcher
wait "$launcher"
code=$?

((code > 192)) && code=$((384 - code)) # a rank that signal n has ended: -n for the launcher, 128 + n for a shell
# 143: a rank that was still starting, or heard it twice
[[ $asked && ($code == 1 || $code == 143) ]] && code=75
if ((code)); then
    now=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' Restarts=[0-9]*')
    if [[ $now && $now != " Restarts=${SLURM_RESTART_COUNT:-0}" ]]; then
        # This node's slurmd died, say. At any other code srun would now end the step of its number: the next start's.
        echo "exit code $code of restart ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME; the job has been started again meanwhile"
        exit 0
    fi
fi
case $code in
    0) ;;
    # All ranks leave with these two. srun ends the other nodes at the first code that is not 0, and their launchers look
    # at the ranks once a second: give them time to see the same.
    2 | 75) sleep 2 ;;
    137) ;; # killed here: no host is lost, and the others are to end at once
    *)
        # srun would wait for a host that does not answer until Slurm gives the host up
        read -ra hosts <<<"$QVTUNE_HOSTS"
        [[ $(python -m qvtune.submit.batch lost "$QVTUNE_MASTER_PORT" "${hosts[@]}") ]] &&
            scancel --batch --signal=USR2 "$SLURM_JOB_ID"
        ;;
esac
exit "$code"

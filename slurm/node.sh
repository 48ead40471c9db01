#!/bin/bash
# Starts the ranks of one node: node.sh SCRIPT [ARGUMENT ...] runs the script with DeepSpeed's launcher. slurm/train.sbatch
# sets the QVTUNE_* variables.
set -u

# Prints the launcher's list of nodes and devices, {"n1": [0, 1], "n2": [0, 1]} in base64. The launcher sets
# CUDA_VISIBLE_DEVICES from it: on this node the devices that Slurm has granted, by default 0, 1, ... For other nodes only
# the number of devices matters.
world_info() {
    local default given host
    default=$(seq -s , 0 $((QVTUNE_PROCS_PER_NODE - 1)))
    given=$(cut -d , -f "1-$QVTUNE_PROCS_PER_NODE" <<<"${CUDA_VISIBLE_DEVICES:-}")
    [[ $given =~ ^[0-9]+(,[0-9]+)*$ && $(tr , '\n' <<<"$given" | wc -l) == "$QVTUNE_PROCS_PER_NODE" ]] || given=$default
    for host in $QVTUNE_HOSTS; do
        if [[ $host == "$SLURMD_NODENAME" ]]; then echo "\"$host\": [$given]"; else echo "\"$host\": [$default]"; fi
    done | paste -s -d , | sed 's/.*/{&}/' | base64 --wrap 0 | tr '+/' '-_'
}

# Slurm signals every process of the step, and the ranks stop on request. Ranks that do not exist yet read the request from
# the file when they start.
stop_folder=$(mktemp -d) || exit
trap 'rm -r "$stop_folder"' EXIT
export QVTUNE_STOP_FILE=$stop_folder/signal
trap 'echo SIGTERM >"$QVTUNE_STOP_FILE"' TERM
trap 'echo SIGUSR1 >"$QVTUNE_STOP_FILE"' USR1
(
    trap '' TERM USR1
    # Not `deepspeed --no_ssh`: that is one interpreter more, and turns the code of a launcher killed by a signal into 0.
    exec python -u -m qvtune.distributed.node_launcher --world_info "$(world_info)" --node_rank "$SLURM_NODEID" \
        --master_addr "${QVTUNE_HOSTS%% *}" --master_port "$QVTUNE_MASTER_PORT" --log_level warning \
        --no_python --no_local_rank bash "${BASH_SOURCE%/*}/rank.sh" "$@"
) &
launcher=$!
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done # a signal ends `wait`, not the launcher
wait "$launcher"
code=$?

((code > 192)) && code=$((384 - code)) # a rank killed by signal n: -n for the launcher, 128 + n for a shell
if ((code)); then
    now=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' Restarts=[0-9]*')
    if [[ $now && $now != " Restarts=${SLURM_RESTART_COUNT:-0}" ]]; then
        # For example this node's slurmd died. With another code srun would end the step of the same number: that of the
        # next start.
        echo "exit code $code of restart ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME; the job has been restarted meanwhile"
        exit 0
    fi
fi
case $code in
    0) ;;
    # All ranks exit with these two codes. srun ends the other nodes at the first non-zero code, and their launchers poll
    # the ranks once per second: give them time to see the same code.
    2 | 75) sleep 2 ;;
    137) ;; # killed on this node: no host is lost, and the others must end at once
    *)
        # srun would wait for a host that does not answer until Slurm marks it as down
        read -ra hosts <<<"$QVTUNE_HOSTS"
        [[ $(python -m qvtune.submit.batch lost "$QVTUNE_MASTER_PORT" "${hosts[@]}") ]] &&
            scancel --batch --signal=USR2 "$SLURM_JOB_ID"
        ;;
esac
# srun then stops the other nodes, whose ranks may return 75, and returns the highest code of all nodes: an error must win.
((code == 1)) && code=101
exit "$code"

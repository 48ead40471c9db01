# shellcheck shell=bash
# Sourced by the batch scripts, which set $home: reads the cluster's settings and puts the code of $home on PYTHONPATH.
settings=${QVTUNE_CLUSTER_ENV:-$home/slurm/cluster.env}
if [[ ! -r $settings ]]; then
    echo "error: $settings does not exist: cp slurm/cluster.env.example slurm/cluster.env, and edit it" >&2
    exit 2
fi
# shellcheck source=/dev/null
source "$settings"
set -u # only now: module systems use unset variables
export PYTHONPATH=$home/src${PYTHONPATH:+:$PYTHONPATH}

# shellcheck shell=bash
# Sourced by the batch scripts, with $home set: the cluster's settings, and this checkout's code.
settings=${QVTUNE_CLUSTER_ENV:-$home/slurm/cluster.env}
if [[ ! -r $settings ]]; then
    echo "error: $settings is not there: cp slurm/cluster.env.example slurm/cluster.env, and edit it" >&2
    exit 2
fi
# shellcheck source=/dev/null
source "$settings"
set -u # not before: module systems use variables that are not set
export PYTHONPATH=$home/src${PYTHONPATH:+:$PYTHONPATH}

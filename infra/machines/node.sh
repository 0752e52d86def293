#!/usr/bin/env bash
# Run a machine's part of a Ray cluster in the foreground, until SIGTERM.
#
#   node.sh head [OPTION…]     the head; it has no CPUs for workers. Options are those of `ray start`
#   node.sh worker [OPTION…]   a node with workers, which joins SAGAN_HEAD and leaves at the notice of SAGAN_CLOUD
#   node.sh submit JOB [KEY=VALUE…]   submit jobs/JOB.yaml, follow it, and submit it again after a lost head
#   node.sh stop [JOB]         stop a job, or all jobs of this head, and wait for their last checkpoints
#
# The settings are in the file SAGAN_NODE_ENV, by default /etc/sagan/node.env: see node.env.
# The head starts job files of its current folder, so start it in the root of the checkout.
set -euo pipefail

machines=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname "$(dirname "$machines")")
scripts=$checkout/infra/kubernetes/base/scripts # they need nothing of Kubernetes
settings=${SAGAN_NODE_ENV:-/etc/sagan/node.env}
if [[ -e $settings ]]; then
    set -o allexport
    # shellcheck source=infra/machines/node.env
    source "$settings"
    set +o allexport
fi
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} # workers import the same code
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:?is not set. Every machine needs the same token}
dashboard=${RAY_DASHBOARD_ADDRESS:-127.0.0.1:8265} # accepts jobs; on the head

open_files() { # as many as Ray recommends, or as many as are allowed
    ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
}

part=${1:?head, worker, submit or stop}
shift
case $part in
head)
    open_files
    export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-120} # for a last checkpoint; the default of Ray is 3
    exec ray start --head --block --num-cpus=0 "$@"
    ;;
worker)
    open_files
    start=(ray start --block --address="${SAGAN_HEAD:?is not set. It is HOST:PORT of the head}" "$@")
    if [[ ${SAGAN_CLOUD-} ]]; then
        exec python "$machines/leave_at_notice.py" "$SAGAN_CLOUD" "${start[@]}"
    fi
    # SIGTERM drains the node, for example when the machine shuts down. The default of Ray is 30 s
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-100}
    exec "${start[@]}"
    ;;
submit)
    export RAY_DASHBOARD_ADDRESS=$dashboard RAY_JOB_SUBMISSION_ID=${1:?the name of a file in jobs/, without .yaml}
    shift
    exec python "$scripts/submit.py" "jobs/$RAY_JOB_SUBMISSION_ID.yaml ${*@Q}"
    ;;
stop)
    export RAY_API_SERVER_ADDRESS=http://$dashboard
    if [[ $# -gt 0 ]]; then
        exec ray job stop "$1"
    fi
    exec python "$scripts/stop_jobs.py"
    ;;
*)
    echo "node.sh: unknown part $part" >&2
    exit 2
    ;;
esac

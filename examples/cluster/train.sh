#!/usr/bin/env bash
# One machine's part of a training job; the same command runs on every machine. Arguments are those of run_mindformer.py.
#
#   bash examples/cluster/train.sh --config research/telechat/finetune_telechat_7b.yaml --train_dataset DIR ...
#   MACHINES=2 NODE_RANK=0 MASTER_IP=10.0.0.1 bash examples/cluster/train.sh ...
#
# MACHINES, NODE_RANK and MASTER_IP come from the environment, else from Slurm, else from a Volcano job whose task is
# named "worker" (plugins svc and env); without any of them the job has one machine. The steps: resolve the master's
# address, check this machine's cards (`doctor`), start the launcher under the supervisor.
#
# Further variables: CARDS (per machine, 8), MASTER_PORT (8118), LOG_DIR (output/msrun_log), MAX_RESTARTS (3),
# HANG_TIMEOUT (1800 s), CLUSTER_TIME_OUT (7200 s), DOCTOR (True; False leaves the check out).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MACHINES=${MACHINES:-$SLURM_JOB_NUM_NODES}
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
    MASTER=${MASTER_IP:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
elif [ -n "${VC_WORKER_HOSTS:-}" ]; then
    MACHINES=${MACHINES:-$VC_WORKER_NUM}
    NODE_RANK=${NODE_RANK:-$VC_TASK_INDEX}
    MASTER=${MASTER_IP:-${VC_WORKER_HOSTS%%,*}}
else
    MACHINES=${MACHINES:-1}
    MASTER=${MASTER_IP:-}
fi
CARDS=${CARDS:-8}
MASTER_PORT=${MASTER_PORT:-8118}
CLUSTER_TIME_OUT=${CLUSTER_TIME_OUT:-7200}

ADDRESS=()
if ((MACHINES > 1)); then
    [ -n "${NODE_RANK:-}" ] || die "MACHINES is $MACHINES, and NODE_RANK is not set: set it to 0 ... $((MACHINES - 1))"
    [ -n "$MASTER" ] || die "MACHINES is $MACHINES, and MASTER_IP is not set: set it to the address of machine 0"
    # In a fresh job the name of machine 0 may take a while to appear.
    for _ in {1..60}; do
        MASTER_IP=$(getent ahostsv4 "$MASTER" | awk 'NR == 1 { print $1 }') || true
        [ -z "$MASTER_IP" ] || break
        sleep 5
    done
    [ -n "$MASTER_IP" ] || die "the name $MASTER does not resolve on this machine; set MASTER_IP to an address"
    [[ $MASTER_IP != 127.* ]] ||
        die "$MASTER resolves to $MASTER_IP here, which other machines cannot reach; set MASTER_IP to an address"
    ADDRESS=("$CARDS" "$MASTER_IP")
fi
NODE_RANK=${NODE_RANK:-0}
# A folder per machine: on shared storage the launchers would overwrite each other's reports.
LOG_DIR=${LOG_DIR:-output/msrun_log}/machine_$NODE_RANK

case ${DOCTOR:-True} in
    False | false) ;;
    *)
        bash scripts/msrun_launcher.sh "python -m research.telechat doctor" \
            "$CARDS" "$((MASTER_PORT + 1))" "$LOG_DIR/doctor" True 600 ||
            die "doctor found a problem on machine $NODE_RANK; its table is in $LOG_DIR/doctor/worker_0.log"
        ;;
esac

COMMAND="python run_mindformer.py $(printf '%q ' "$@")--use_parallel True --resume_training True \
--register_path research/telechat"
if ((MACHINES > 1)); then ADDRESS+=("$MASTER_PORT" "$NODE_RANK"); else ADDRESS+=("$MASTER_PORT"); fi
exec python scripts/supervise.py --max_restarts "${MAX_RESTARTS:-3}" --hang_timeout "${HANG_TIMEOUT:-1800}" \
    --log_dir "$LOG_DIR" -- bash scripts/msrun_launcher.sh "$COMMAND" \
    "$((MACHINES * CARDS))" "${ADDRESS[@]}" "$LOG_DIR" True "$CLUSTER_TIME_OUT"

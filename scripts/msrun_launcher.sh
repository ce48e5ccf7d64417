#!/usr/bin/env bash
# Starts a command as one process per card under msrun, on one machine or on several. The recipe sets the parallel plan.
#
#   bash scripts/msrun_launcher.sh "COMMAND"                              8 workers on this machine
#   bash scripts/msrun_launcher.sh "COMMAND" WORKER_NUM
#   bash scripts/msrun_launcher.sh "COMMAND" WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
#   bash scripts/msrun_launcher.sh "COMMAND" WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN \
#                                  CLUSTER_TIME_OUT                       on each machine, with its own NODE_RANK
#
# COMMAND is read by the shell, so arguments with markers need quotes inside it: --predict_data '<_user>hello<_bot>'.
# It may begin with `VAR=value`, and with the path of an interpreter; without a program, `python` is put before it.
# JOIN True waits, shows the output, and names the first error of the first failing rank; JOIN False (the default)
# returns at once and leaves the workers running. With JOIN True, SIGTERM ends the workers; those of a server finish their
# answers first, unless a second one comes. CLUSTER_TIME_OUT: seconds to wait for all workers to join.
#
# Environment: MF_LOG_SUFFIX=x appends _x to the names of the log folders. LOG_MF_PATH is where MindFormers logs
# (default: output/log). PLOG_REDIRECT_TO_OUTPUT=True (or PLOG_REDICT_TO_OUTPUT, an earlier spelling) puts Ascend's own
# logs under output/plog. TELECHAT_BIND_CORE=False disables the binding of workers to cores.
# HCCL_CONNECT_TIMEOUT (default here: 1800, at most 7200; HCCL's own: 120): seconds that a rank waits for the others
# before the first transfer. Ranks need different times to load their shards and compile: docs/parallel.md.
set -u

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
ROOT=$(dirname "$SCRIPTS")

say() { printf '%s\n' "[msrun_launcher] $*"; }

die() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

usage() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p}}' "${BASH_SOURCE[0]}"; }

number() { # NAME VALUE LOWEST HIGHEST
    [[ $2 =~ ^(0|-?[1-9][0-9]{0,8})$ ]] || die "$1 must be a whole number, found '$2'"
    (($2 >= $3 && $2 <= $4)) || die "$1 must lie between $3 and $4, found $2"
}

WORKER_NUM=8
MASTER_ADDR=127.0.0.1
MASTER_PORT=8118
NODE_RANK=0
LOG_DIR=output/msrun_log
JOIN=False
CLUSTER_TIME_OUT=7200

case ${1:-} in -h | --help) usage && exit 0 ;; esac
case $# in
    1) LOCAL_WORKER=$WORKER_NUM ;;
    2) WORKER_NUM=$2 LOCAL_WORKER=$2 ;;
    6) WORKER_NUM=$2 LOCAL_WORKER=$2 MASTER_PORT=$3 LOG_DIR=$4 JOIN=$5 CLUSTER_TIME_OUT=$6 ;;
    9) WORKER_NUM=$2 LOCAL_WORKER=$3 MASTER_ADDR=$4 MASTER_PORT=$5 NODE_RANK=$6 LOG_DIR=$7 JOIN=$8 CLUSTER_TIME_OUT=$9 ;;
    *)
        usage >&2
        die "found $# arguments; the forms above have 1, 2, 6 and 9. Is COMMAND one quoted argument?" ;;
esac
COMMAND=$1

number WORKER_NUM "$WORKER_NUM" 1 1000000
number LOCAL_WORKER "$LOCAL_WORKER" 1 1000000
number MASTER_PORT "$MASTER_PORT" 1024 65535
number NODE_RANK "$NODE_RANK" 0 1000000
number CLUSTER_TIME_OUT "$CLUSTER_TIME_OUT" -1 100000000
((LOCAL_WORKER <= WORKER_NUM)) ||
    die "LOCAL_WORKER $LOCAL_WORKER (on this machine) exceeds WORKER_NUM $WORKER_NUM (on all machines); lower it"
((WORKER_NUM % LOCAL_WORKER == 0)) ||
    die "WORKER_NUM $WORKER_NUM is not a multiple of LOCAL_WORKER $LOCAL_WORKER; every machine runs the same number"
NODES=$((WORKER_NUM / LOCAL_WORKER))
((NODE_RANK < NODES)) || die "NODE_RANK $NODE_RANK does not exist: $NODES machine(s) are counted from 0"
[ -n "$LOG_DIR" ] || die "LOG_DIR is empty; name a folder for the logs"
case $JOIN in
    True | true) JOIN=True ;;
    False | false) JOIN=False ;;
    *) die "JOIN must be True or False, found '$JOIN'" ;;
esac

# If COMMAND names an interpreter by its path, the msrun next to it is used.
ASSIGNED='([A-Za-z_][A-Za-z0-9_]*=[^[:space:]]*[[:space:]]+)*'
if [[ $COMMAND =~ ^[[:space:]]*$ASSIGNED(/[^[:space:]]*)/python[0-9.]*([[:space:]]|$) ]] &&
    [ -x "${BASH_REMATCH[2]}/msrun" ] && [ -x "${BASH_REMATCH[2]}/python" ]; then
    PATH=${BASH_REMATCH[2]}:$PATH
fi
if ! command -v msrun >/dev/null && [ -x "$ROOT/.venv/bin/msrun" ]; then PATH=$ROOT/.venv/bin:$PATH; fi
command -v msrun >/dev/null || die "msrun not found: MindSpore is not installed here, or its environment is not active." \
    "       bash scripts/quickstart.sh makes one in .venv, which this script finds."
command -v python >/dev/null || die "msrun starts its workers with 'python', and there is no such program on PATH"
export PATH PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export TELECHAT_LOCAL_WORKERS=$LOCAL_WORKER   # run/resources.py: how many ranks share this disk and memory

export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800}
SUFFIX=${MF_LOG_SUFFIX:+_$MF_LOG_SUFFIX}
LOG_DIR=$LOG_DIR$SUFFIX
export LOG_MF_PATH="${LOG_MF_PATH:-$PWD/output/log$SUFFIX}"
if [ "${PLOG_REDIRECT_TO_OUTPUT:-${PLOG_REDICT_TO_OUTPUT:-False}}" != False ]; then
    export ASCEND_PROCESS_LOG_PATH="$PWD/output/plog$SUFFIX"
    say "Ascend's own logs go to $ASCEND_PROCESS_LOG_PATH"
fi

CHECKS=(--workers "$LOCAL_WORKER" --port "$MASTER_PORT" --node_rank "$NODE_RANK")
if ((NODES > 1)); then CHECKS+=(--master "$MASTER_ADDR"); fi
python "$SCRIPTS/launcher_check.py" "${CHECKS[@]}" -- "$COMMAND" || exit 1
mapfile -d '' -t PARTS < <(python "$SCRIPTS/launcher_check.py" --split -- "$COMMAND")
((${#PARTS[@]} == 3)) || die "COMMAND could not be read"
python "$SCRIPTS/plan.py" --check --ranks "$WORKER_NUM" --command "$COMMAND" || exit 1

mkdir -p "$LOG_DIR" || die "the log folder $LOG_DIR cannot be made; name another LOG_DIR"
LOG_PATH=$(cd "$LOG_DIR" && pwd)
STARTED=$(date +%s)
ulimit -u unlimited 2>/dev/null || true   # only root may; the limit that is set will do in most cases

OPTIONS=(--worker_num="$WORKER_NUM" --local_worker_num="$LOCAL_WORKER" --master_port="$MASTER_PORT"
    --log_dir="$LOG_PATH" --join="$JOIN" --cluster_time_out="$CLUSTER_TIME_OUT")
case ${TELECHAT_BIND_CORE:-True} in False | false) ;; *) OPTIONS+=(--bind_core=True) ;; esac
FIRST_RANK=0
if ((NODES > 1)); then
    FIRST_RANK=$((NODE_RANK * LOCAL_WORKER))
    OPTIONS+=(--master_addr="$MASTER_ADDR" --node_rank="$NODE_RANK")
fi
LAST_RANK=$((FIRST_RANK + LOCAL_WORKER - 1))
say "$WORKER_NUM worker(s) on $NODES machine(s), here rank $FIRST_RANK to $LAST_RANK;" \
    "scheduler $MASTER_ADDR:$MASTER_PORT; logs $LOG_PATH"
if ((NODES > 1 && NODE_RANK == 0)); then
    say "start the same command on the other machine(s) with NODE_RANK 1 to $((NODES - 1))," \
        "within $CLUSTER_TIME_OUT s"
fi

if ((WORKER_NUM == 1)); then
    say "one worker: MindFormers' launcher starts none and asks for plain python; here it runs, as commands with one" \
        "worker always have. COMMAND alone does the same without msrun."
fi

# msrun takes a program it does not know for a script of `python`: that script is then one that becomes the program.
BECOME=""
if [ "${PARTS[2]}" = 1 ]; then BECOME="python -c 'import os, sys; os.execvp(sys.argv[1], sys.argv[1:])'"; fi
MSRUN="msrun $(printf '%q ' "${OPTIONS[@]}")"
# The processes of this job: msrun tells each of them the scheduler's port by its environment.
job_pids() {
    local entry
    for entry in /proc/[0-9]*; do
        if grep -qzxs "MS_SCHED_PORT=$MASTER_PORT" "$entry/environ"; then printf '%s ' "${entry#/proc/}"; fi
    done
}

if [ "$JOIN" = False ]; then
    eval "${PARTS[0]} $MSRUN $BECOME ${PARTS[1]}" || die "msrun could not start the workers (see above)"
    pids=$(job_pids)
    say "the workers run in the background. This does not wait for them, and cannot tell whether they succeed."
    # With pipeline stages only the last rank has the loss.
    say "follow:  tail -f $LOG_PATH/worker_$LAST_RANK.log"
    say "errors:  python $SCRIPTS/launcher_report.py $LOG_PATH"
    say "stop:    kill $pids"
    exit 0
fi

# One worker's output is enough on the screen; the others say the same, or their errors are reported at the end.
SERVES=False SHOWN_RANK=$LAST_RANK
if [[ $COMMAND =~ (^|[[:space:]./])(serve\.py|telechat[[:space:]]+serve)([[:space:]]|$) ]]; then
    SERVES=True SHOWN_RANK=$FIRST_RANK
fi
MSRUN="msrun --tail_worker_log=$SHOWN_RANK ${MSRUN#msrun }"
(eval "${PARTS[0]} exec $MSRUN $BECOME ${PARTS[1]}") &
child=$!
rm -f "$LOG_PATH/exits.json"
python "$SCRIPTS/launcher_watch.py" "$child" "$LOG_PATH" --workers "$LOCAL_WORKER" &
watcher=$!

stop() {
    trap '' INT TERM
    say "stopping the workers"
    kill -INT "$child" 2>/dev/null   # msrun ends its workers itself, once it waits for them
    local n
    for n in 1 2 3 4 5; do
        kill -0 "$child" 2>/dev/null || break
        sleep 1
    done
    # shellcheck disable=SC2046
    kill -KILL "$child" $(job_pids) 2>/dev/null
    exit 130
}
FINISHING=False
finish() {
    local pid
    FINISHING=True
    trap stop INT TERM
    say "the server finishes the answers under way; a second signal ends it at once"
    for pid in $(job_pids); do
        if grep -qzxs "MS_ROLE=MS_WORKER" "/proc/$pid/environ"; then kill -TERM "$pid" 2>/dev/null; fi
    done
}
trap stop INT TERM
if [ "$SERVES" = True ]; then trap finish TERM; fi
wait "$child"
status=$?
while [ "$FINISHING" = True ]; do       # it has interrupted `wait`
    FINISHING=False
    wait "$child"
    status=$?
done
wait "$watcher"
if [ "$status" -ne 0 ]; then
    python "$SCRIPTS/launcher_report.py" "$LOG_PATH" --since "$STARTED" --workers "$WORKER_NUM"
    printf 'error: the job failed (msrun ended with %s); all logs are in %s\n' "$status" "$LOG_PATH" >&2
    exit 1
fi
say "all workers ended well; logs $LOG_PATH"

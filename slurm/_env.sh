# shellcheck shell=bash
# What the batch scripts share; sourced by them, on the first node of a job.
#
# What to set, in the environment or here:
DAN_REPOSITORY=${DAN_REPOSITORY:-${SLURM_SUBMIT_DIR:-$PWD}} # where this repository lies, on all nodes
DAN_PYTHON=${DAN_PYTHON:-python} # the environment's Python, on all nodes; of several words, a command
DAN_CONFIG=${DAN_CONFIG:-}       # another configuration than the script's own
DAN_DATA=${DAN_DATA:-}           # another folder, or URL, of shards than the configuration's
DAN_CACHE=${DAN_CACHE:-}         # node-local storage into which shards are copied first
DAN_NPROC=${DAN_NPROC:-}         # processes a node; none: the GPUs that --gpus-per-node asks for
DAN_DEVICE=${DAN_DEVICE:-cuda}   # cpu: no GPU is asked for or looked at
export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$DAN_REPOSITORY/mlflow.db}
# srun gives a task one core where nobody asks for more: here those of sbatch's --cpus-per-task, or
# all of the node, which is the job's alone (--exclusive). Each rank stays on those beside its GPU.
dan_cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}
[ -z "$dan_cores" ] || export SRUN_CPUS_PER_TASK=$dan_cores
# Of a node that is the job's alone (--exclusive) Slurm gives all GPUs, whatever is asked for.
dan_gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # 8, or a100:8
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The words of DAN_PYTHON: one where that is the name or the path of a program, which may have
# spaces. Quotes hold a word together; nothing in it is expanded or run.
dan_python=("$DAN_PYTHON")
if ! command -v -- "$DAN_PYTHON" >/dev/null; then
    mapfile -d '' -t dan_python < <(printf '%s' "$DAN_PYTHON" | xargs printf '%s\0')
fi
[ -n "${dan_python[0]:-}" ] || { echo "error: DAN_PYTHON is no command: $DAN_PYTHON" >&2; exit 2; }

dan_signal= # the last signal: USR1 comes before the time limit, TERM when the job is cancelled
dan_step=   # the process of srun while it trains
export DAN_STOP_FILE=

# From now on signals are noted, and passed on.
dan_listen() {
    trap 'dan_stop USR1' USR1
    trap 'dan_stop TERM' TERM
}

dan_stop() {
    dan_signal=$1
    echo "signal $1 at $(date): a checkpoint"
    # Workers that do not listen yet look for this file when they do.
    [ -z "$DAN_STOP_FILE" ] || : >"$DAN_STOP_FILE" || true
    [ -z "$dan_step" ] || kill -USR1 "$dan_step" 2>/dev/null || true
}

# Ends the job, with the node's name, where a node lacks a GPU or DALI does not start.
dan_check() {
    # shellcheck disable=SC2016 # the variables are the node's
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
        timeout -k 5 180 "$@" ||
            { echo "error: node $SLURMD_NODENAME failed its check (code $?)" >&2; exit 1; }' \
        check "${dan_python[@]}" "$DAN_REPOSITORY/slurm/health.py" "$DAN_DEVICE"
}

# dan_train CONFIG OUTPUT [section.key=value ...]: one torchrun a node. On USR1 a checkpoint, and
# the job goes back into the queue; on TERM a checkpoint. OUTPUT is the run's folder, unless a
# train.output=… names another: what follows is about the folder in which the run writes.
dan_train() {
    local config=$1 output=$2 name=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} word
    shift 2
    for word in "$@"; do
        case $word in
            # Forms in which train.py reads another folder than stands there
            train=* | train.output= | train.output=[\'\"~[:space:]]* | train.output=*\$*)
                echo "error: $word: expected train.output=FOLDER, without quotes, ~ or \$" >&2
                return 2
                ;;
            train.output=*) output=${word#*=} ;;
        esac
    done
    dan_listen
    mkdir -p "$output/logs"
    rm -f "$output"/stop.* # an earlier attempt's
    DAN_STOP_FILE=$output/stop.$name
    if [[ $MLFLOW_TRACKING_URI == sqlite:* && "$SLURM_NNODES${SLURM_ARRAY_TASK_ID:-}" != 1 ]]; then
        echo "warning: several nodes write $MLFLOW_TRACKING_URI; better a server" >&2
    fi
    dan_check || return 1
    rm -f "$output/outcome.json" # an earlier attempt's; where no attempt begins, it stays true
    local code=0
    [ -n "$dan_signal" ] || dan_run "$name" "$config" "$output" "$@" || code=$?
    rm -f "$DAN_STOP_FILE"
    dan_end "$output" "$code"
}

# dan_run NAME CONFIG OUTPUT [section.key=value ...]: returns the step's exit code.
dan_run() {
    local name=$1 config=${DAN_CONFIG:-$2} output=$3 first address code=0
    shift 3
    local overrides=("train.output=$output" "train.device=$DAN_DEVICE")
    [ -z "$DAN_DATA" ] || overrides+=("data.shards=$DAN_DATA")
    [ -z "$DAN_CACHE" ] || overrides+=("data.cache=$DAN_CACHE")
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The address that Slurm itself uses: a node's name need not resolve.
    address=$(scontrol show node -o "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    # torchrun would die of USR1, so it is started deaf to it; its workers listen again. A node's log
    # holds the lines of all its ranks; those of rank 0, on whichever node, are the job's own too.
    # What follows torchrun in the pipe stays to the end whatever signal comes.
    # shellcheck disable=SC2016 # the variables are the node's
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 bash -c 'trap "" USR1; trap : TERM
            python=("${@:2:$1}")
            shift "$(($1 + 1))"
            export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank \${rank}]: "
            "${python[@]}" -m torch.distributed.run --log-dir="$0-node$SLURM_NODEID" "$@" 2>&1 |
                { trap "" TERM INT; tee -a "$0-node$SLURM_NODEID.log" | sed -un "s/^\[rank 0\]: //p"; }
            exit "${PIPESTATUS[0]}"' \
        "$output/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID" "${#dan_python[@]}" "${dan_python[@]}" \
        --tee=3 --nnodes="$SLURM_NNODES" \
        --nproc-per-node="${DAN_NPROC:-${dan_gpus##*:}}" --rdzv-backend=c10d \
        --rdzv-id="$name" --rdzv-endpoint="$address:$((20000 + SLURM_JOB_ID % 10000))" \
        --max-restarts="${DAN_RESTARTS:-0}" \
        "$DAN_REPOSITORY/launch/train.py" "$config" "${overrides[@]}" "$@" &
    dan_step=$!
    # A trap ends a wait before the step has ended; its code is what the last wait gives.
    until wait "$dan_step" || ! kill -0 "$dan_step" 2>/dev/null; do :; done
    wait "$dan_step" || code=$?
    dan_step=
    return "$code"
}

# dan_end OUTPUT CODE: what becomes of the job. Only USR1 takes it back into the queue: a job that
# is cancelled stays out, and one that Slurm preempts, Slurm requeues.
dan_end() {
    local outcome
    outcome=$(sed -n 's/.*"status": "\([a-z]*\)".*/\1/p' "$1/outcome.json" 2>/dev/null || true)
    if [ "$outcome" = finished ]; then
        [ -z "$dan_signal" ] || return 0
        return "$2"
    fi
    if [ "$dan_signal" = USR1 ] && [ "$outcome" != failed ]; then
        echo "preempted at $(date); back into the queue"
        trap - USR1 TERM
        scontrol requeue "$(dan_job)"
        return 0
    fi
    local reason="no outcome was left (exit code $2): it was killed"
    # A JSON string, in which \" is a quote and \\ a backslash
    [ -z "$outcome" ] || reason=$(sed -n 's/.*"reason": "\(\([^"\\]\|\\.\)*\)".*/\1/p' "$1/outcome.json" |
        sed 's/\\\(["\\]\)/\1/g')
    echo "error: the run ended as ${outcome:-failed}: $reason; see $1/logs" >&2
    return $(($2 ? $2 : 1))
}

# The name by which scontrol knows this job, or this task of an array.
dan_job() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# shellcheck shell=bash
# What the batch scripts share; sourced by them, on the first node of a job.
#
# What to set, in the environment or here:
DAN_REPOSITORY=${DAN_REPOSITORY:-${SLURM_SUBMIT_DIR:-$PWD}} # where this repository lies, on all nodes
DAN_PYTHON=${DAN_PYTHON:-python} # the environment's Python, on all nodes
DAN_CONFIG=${DAN_CONFIG:-}       # another configuration than the script's own
DAN_DATA=${DAN_DATA:-}           # another folder, or URL, of shards than the configuration's
DAN_CACHE=${DAN_CACHE:-}         # node-local storage into which shards are copied first
DAN_NPROC=${DAN_NPROC:-}         # processes a node; none: the node's GPUs
DAN_DEVICE=${DAN_DEVICE:-cuda}   # cpu: no GPU is asked for or looked at
export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$DAN_REPOSITORY/mlflow.db}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export DAN_PYTHON DAN_DEVICE DAN_REPOSITORY

# Ends the job, with the node's name, where a node has no usable GPU or DALI does not start.
dan_check() {
    # shellcheck disable=SC2016 # the variables are the node's
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
        "$DAN_PYTHON" "$DAN_REPOSITORY/slurm/health.py" "$DAN_DEVICE" ||
            { echo "error: node $SLURMD_NODENAME failed its check" >&2; exit 1; }'
}

# dan_train CONFIG OUTPUT [section.key=value ...]: one torchrun a node; on USR1, which comes before
# the time limit, and on TERM, a checkpoint, and the job goes back into the queue.
dan_train() {
    local config=${DAN_CONFIG:-$1} output=$2 first address port
    shift 2
    local overrides=("train.output=$output" "train.device=$DAN_DEVICE")
    [ -z "$DAN_DATA" ] || overrides+=("data.shards=$DAN_DATA")
    [ -z "$DAN_CACHE" ] || overrides+=("data.cache=$DAN_CACHE")
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The address that Slurm itself uses: a node's name need not resolve.
    address=$(scontrol show node -o "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    port=$((20000 + SLURM_JOB_ID % 10000))
    local processes=${DAN_NPROC:-${SLURM_GPUS_ON_NODE:-1}}
    local name=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    mkdir -p "$output/logs"
    dan_check || return 1
    trap 'dan_stop USR1' USR1
    trap 'dan_stop TERM' TERM
    # torchrun would die of USR1, so it is started deaf to it; its workers listen again.
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 --output="$output/logs/%x-%j-node%n.log" \
        --open-mode=append bash -c 'trap "" USR1; exec "$@"' -- \
        "$DAN_PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" \
        --nproc-per-node="$processes" --rdzv-backend=c10d --rdzv-id="$name" \
        --rdzv-endpoint="$address:$port" --max-restarts="${DAN_RESTARTS:-0}" \
        "$DAN_REPOSITORY/launch/train.py" "$config" "${overrides[@]}" "$@" &
    dan_step=$!
    dan_outcome=$output/outcome.json
    local code=0
    wait "$dan_step" || code=$?
    # A trap ends the first wait before the step has ended.
    while kill -0 "$dan_step" 2>/dev/null; do
        code=0
        wait "$dan_step" || code=$?
    done
    if grep -qs '"status": "preempted"' "$dan_outcome"; then
        echo "preempted at $(date); back into the queue"
        scontrol requeue "$(dan_job)"
        return 0
    fi
    return "$code"
}

dan_stop() {
    echo "signal $1 at $(date): a checkpoint, then the queue"
    kill -USR1 "$dan_step" 2>/dev/null || true
}

# The name by which scontrol knows this job, or this task of an array.
dan_job() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

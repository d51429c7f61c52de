#!/usr/bin/env bash
# One run for each number of attention heads, 0 (the baseline) to 8, side by side:
#   sbatch [--array=1,2,4] slurm/heads.sh [section.key=value ...]
#SBATCH --job-name=heads
#SBATCH --array=0-8
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
source "${DAN_REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm/_env.sh"
heads=$SLURM_ARRAY_TASK_ID
losses=()
[ "$heads" -gt 0 ] || losses=(loss.fcn=none loss.afn=none)
dan_train configs/affectnet8.yaml "${DAN_RUNS:-runs}/heads-$SLURM_ARRAY_JOB_ID/$heads" \
    "model.heads=$heads" "${losses[@]}" "tracking.run_name=heads-$heads" \
    "tracking.parent=heads-$SLURM_ARRAY_JOB_ID" "$@"

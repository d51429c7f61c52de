#!/usr/bin/env bash
# One run for each number of attention heads, 0 (the baseline) to 8, side by side, and the comparison:
#   sbatch [--array=1,2,4] slurm/heads.sh [section.key=value ...]
#   sbatch --array=0-26 slurm/heads.sh --seeds 3
# Submitted again, it trains what is missing. Another grid: DAN_GRID=fcn-loss, with --array=0-2.
#SBATCH --job-name=heads
##SBATCH --partition=gpu
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
dan_listen
grid=${DAN_GRID:-heads}
config=${DAN_CONFIG:-configs/affectnet8.yaml}
ablate=("${dan_python[@]}" "$DAN_REPOSITORY/launch/ablate.py" "$grid" --config "$config"
    --output "${DAN_RUNS:-runs}/$grid" "$@")
child=$("${ablate[@]}" --child "$SLURM_ARRAY_TASK_ID")
mapfile -t overrides < <(grep -v '^train\.output=' <<<"$child") # which dan_train sets
dan_train "$config" "$(sed -n 's/^train\.output=//p' <<<"$child")" "${overrides[@]}"
# With what the other tasks have finished so far, which may be nothing: the last one's is complete.
"${ablate[@]}" --summary || true

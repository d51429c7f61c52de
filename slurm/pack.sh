#!/usr/bin/env bash
# Packs a release in as many parts as the array has tasks, then merges them:
#   job=$(sbatch --parsable slurm/pack.sh affectnet --source AffectNet --out data/affectnet8)
#   sbatch --dependency=afterok:$job slurm/pack.sh merge --out data/affectnet8
#SBATCH --job-name=pack
##SBATCH --partition=cpu
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A-%a.out
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: sbatch slurm/pack.sh DATASET|merge --out FOLDER ..." >&2; exit 2; }
source "${DAN_REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm/_env.sh"
if [ "$1" = merge ]; then # by one task of the array, which need not be more than one
    [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MIN" ] || exit 0
    exec "${dan_python[@]}" -m shards.pack "$@"
fi
exec "${dan_python[@]}" -m shards.pack "$@" \
    --part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT"

#!/usr/bin/env bash
# Trains configs/affectnet8.yaml: sbatch slurm/affectnet8.sh [section.key=value ...]
# More nodes: sbatch --nodes=4 slurm/affectnet8.sh
#SBATCH --job-name=affectnet8
##SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
source "${DAN_REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm/_env.sh"
dan_train configs/affectnet8.yaml "${DAN_RUNS:-runs}/affectnet8" "$@"

#!/usr/bin/env bash
# Trains configs/rafdb.yaml: sbatch slurm/rafdb.sh [section.key=value ...]
# More nodes: sbatch --nodes=4 slurm/rafdb.sh
#SBATCH --job-name=rafdb
##SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
source "${DAN_REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm/_env.sh"
dan_train configs/rafdb.yaml "${DAN_RUNS:-runs}/rafdb" "$@"

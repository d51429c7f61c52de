#!/usr/bin/env bash
# Trains configs/sfew.yaml: sbatch slurm/sfew.sh [section.key=value ...]
#SBATCH --job-name=sfew
##SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --ntasks-per-node=1
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
source "${DAN_REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm/_env.sh"
dan_train configs/sfew.yaml "${DAN_RUNS:-runs}/sfew" "$@"

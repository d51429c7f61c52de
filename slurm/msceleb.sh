#!/usr/bin/env bash
# Trains configs/msceleb.yaml: sbatch slurm/msceleb.sh [section.key=value ...]
# More nodes: sbatch --nodes=4 slurm/msceleb.sh
#SBATCH --job-name=msceleb
##SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
source "${DAN_REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm/_env.sh"
dan_train configs/msceleb.yaml "${DAN_RUNS:-runs}/msceleb" "$@"

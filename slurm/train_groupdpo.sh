#!/bin/bash
#SBATCH --job-name=groupdpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#
# Multi-node training: one torchrun per node, one rank per GPU.
#
#   sbatch --nodes=4 slurm/train_groupdpo.sh --config run.yaml --save /shared/run1 --load /shared/run1
#
# Everything after the script's name goes to megatron_groupdpo.train. With --load and --save on one folder a job that is
# submitted again resumes from the last checkpoint. Overridable from the environment:
#   PYTHON            interpreter of the installation          (.venv/bin/python of this checkout)
#   GPUS_PER_NODE     ranks per node                           (what Slurm gives, else 8)
#   MASTER_PORT       rendezvous port on the first node        (from the job id)
set -euo pipefail

here=${SLURM_SUBMIT_DIR:-$PWD}
PYTHON=${PYTHON:-$here/.venv/bin/python}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# Megatron's overlap of tensor-parallel communication needs kernels issued in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

exec srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$GPUS_PER_NODE" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    -m megatron_groupdpo.train "$@"

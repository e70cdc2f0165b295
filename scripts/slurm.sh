#!/usr/bin/env bash
# Trains on the GPUs of many nodes of a SLURM cluster, one task per GPU, without torchrun. From the repository's folder:
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 scripts/slurm.sh \
#       --config configs/conf_train_aux_lets.yaml --data-path /data/imagenet --output_dir /data/runs/lets
#
# Options before the name of this script go to sbatch (also --partition and --account) and override those set below;
# options after it go to main.py. All nodes need access to the data and --output_dir. --batch-size is per GPU.
# The variable PYTHON names the interpreter; default: that of scripts/setup.sh.
#
# Two to three minutes before the time limit, SLURM sends SIGUSR1: the run writes a checkpoint and stops, and the job is
# requeued. It then resumes from its newest checkpoint, also if SLURM itself requeued it because a node failed or another
# job needed the nodes. A job that fails, or that scancel ends, is not requeued: the same command resumes it.
#SBATCH --job-name=learngene
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --cpus-per-gpu=8
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # jobs that share a node get different ones
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}         # as under torchrun: leave the cores to the data workers
export PYTHON=${PYTHON:-.venv/bin/python}

options=(
    --ntasks=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
    --ntasks-per-node="$SLURM_GPUS_ON_NODE"
    --gpu-bind=none # a task sees all GPUs of its node, for direct transfers, and uses the one of its local rank
    --cpu-bind=none # and its data workers run on any core of the job
    --export=ALL    # whatever sbatch was told
    --kill-on-bad-exit=0 --wait=60 # if one process fails, the others end by themselves and print the reason
)
status=0
# The variables of a task exist only there. exec: main.py gets the signals.
srun "${options[@]}" bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec "$PYTHON" -u main.py --resume auto "$@"
' task "$@" || status=$?

if [ "$status" -eq $((128 + $(kill -l USR1))) ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/bin/bash
# Four nodes of eight GPUs with FSDP2: `sbatch examples/slurm.sh recipes/oprd_vanilla.yaml`
# output_dir is on a file system that every node sees. Submitted again, the run goes on where it stopped.
#SBATCH --job-name=oprd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00

set -euo pipefail
NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_NODE="$NODE" NODES="$SLURM_NNODES" GPUS=8

# each node takes its own number; when the time is over, the steps since the last checkpoint are lost
srun --kill-on-bad-exit bash -c 'NODE_RANK="$SLURM_NODEID" exec examples/nodes.sh "$@"' _ "$@" resume_from_checkpoint=latest "save_steps=15 min"

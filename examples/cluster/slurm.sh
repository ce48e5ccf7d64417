#!/usr/bin/env bash
# TeleChat2-115B on eight machines under Slurm: sbatch examples/cluster/slurm.sh. Adapt partition, gres and paths.
#SBATCH --job-name=telechat2-115b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --partition=npu
#SBATCH --gres=npu:8
#SBATCH --time=7-00:00:00
#SBATCH --output=slurm-%j.log
set -euo pipefail

DATA=${DATA:-/shared/telechat}               # shared storage, under the same path on every machine
cd "${SLURM_SUBMIT_DIR:-.}"                  # the root of the repository, on shared storage too
export SHARED_PATHS=$DATA LOG_DIR=$DATA/output/telechat2_115b/msrun_log

# srun starts train.sh once per machine; it finds the master and its own rank in Slurm's variables.
srun --kill-on-bad-exit=1 bash examples/cluster/train.sh \
    --config research/telechat/finetune_telechat2_115b.yaml \
    --train_dataset "$DATA/dataset_dir" \
    --load_checkpoint "$DATA/telechat2_115b" \
    --auto_trans_ckpt True \
    --output_dir "$DATA/output/telechat2_115b"

#!/bin/bash
# A recipe on several machines under SLURM, one launcher a machine:
#   sbatch --nodes 4 --gpus-per-node 8 recipes/launch/slurm.sh fsdp2 recipes/sft.py --model_name_or_path FOLDER ...
# The first argument names a file beside this one. All machines must see the same files.
#SBATCH --job-name=wkv
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --signal=INT@120
set -eu

config="recipes/launch/$1.yaml"
shift
per_node="${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port="$((20000 + SLURM_JOB_ID % 10000))"

# SLURM_NODEID differs from machine to machine, so it is read there.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$0" --num_machines "$1" --num_processes "$2" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$3" --main_process_port "$4" "${@:5}"
' "$config" "$SLURM_JOB_NUM_NODES" "$((SLURM_JOB_NUM_NODES * per_node))" "$first" "$port" "$@"

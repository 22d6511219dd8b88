#!/usr/bin/env bash
# Trains on several machines without a scheduler: run the same command on each, with that machine's number.
#
#   NODES=2 NODE=0 MASTER=10.0.0.1 GPUS=8 launch/torchrun.sh experiment=ngpt_1p2b_dense_bf16 parallel.tensor=2
#   NODES=2 NODE=1 MASTER=10.0.0.1 GPUS=8 launch/torchrun.sh experiment=ngpt_1p2b_dense_bf16 parallel.tensor=2
#
# The run folder and the data must be on a disk that all machines share. On one machine just use `ngpt train`.
set -euo pipefail

: "${NODES:?number of machines}" "${NODE:?number of this machine, from 0}" "${MASTER:?address of machine 0}" "${GPUS:?GPUs in each machine}"

exec torchrun \
  --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$GPUS" \
  --master-addr "$MASTER" --master-port "${MASTER_PORT:-29500}" \
  -m ngpt.launch.cli train "$@" cluster.nodes="$NODES" cluster.gpus_per_node="$GPUS"

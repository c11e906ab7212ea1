#!/bin/bash
# One run over several nodes, without a scheduler. On every node, with its own number:
#   MAIN_NODE=10.0.0.1 NODES=2 NODE_RANK=0 GPUS=8 examples/nodes.sh recipes/oprd_vanilla.yaml
#   MAIN_NODE=10.0.0.1 NODES=2 NODE_RANK=1 GPUS=8 examples/nodes.sh recipes/oprd_vanilla.yaml
# Every node sees output_dir and, under the same path, models and data. Port 29500 of the main node is open to the others.

set -euo pipefail
exec accelerate launch \
  --num_machines "$NODES" --machine_rank "$NODE_RANK" --num_processes $((NODES * GPUS)) \
  --main_process_ip "$MAIN_NODE" --main_process_port "${PORT:-29500}" \
  --mixed_precision no --dynamo_backend no \
  ${STRATEGY---use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP} \
  -m oprd train "$@"

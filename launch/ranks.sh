# Sourced by multi_gpu.sh and multi_node.sh: the array `ranks` holds --processes and DeepSpeed's config.
processes="${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
[ "$processes" -gt 0 ] || processes=1
ranks=(--processes "$processes")
deepspeed="${DEEPSPEED-ds_configs/zero2.json}"
case "${1:-}" in
  sft | grpo | dpo) [ -z "$deepspeed" ] || ranks+=("--run.deepspeed=$deepspeed") ;;
  pipeline) # Its stages have run.processes and run.deepspeed in their own files.
    ranks=() ;;
esac

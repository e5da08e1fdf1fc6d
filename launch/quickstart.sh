#!/usr/bin/env bash
# Train a small language model on this machine: on all its GPUs, or on two CPU processes without any.
#
#   bash launch/quickstart.sh [--task causal-lm|seq2seq] [any training flag]
#
# causal-lm, the default, learns to continue Python; seq2seq to say what a Python function does.
# The first call sets up .venv (minutes); later ones start at once. A flag given here wins over the
# defaults below, --output_dir too. The exit status is that of the training: 75 where a signal (TERM,
# USR1, INT or HUP to this script) ended it after a checkpoint was saved, to go on from with
# --resume_from_checkpoint auto. `python -m dstrain train causal-lm --help`, with the python of .venv,
# lists the training flags.

set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/setup.sh"

TASK="${TASK:-causal-lm}"
case "${1:-}" in
-h | --help) usage ;;
--task)
    TASK="${2:-}"
    shift $(($# < 2 ? $# : 2))
    ;;
--task=*)
    TASK="${1#--task=}"
    shift
    ;;
esac

# ---- defaults ------------------------------------------------------------------------------------
DEFAULTS=(
    --learning_rate 2e-3
    --lr_scheduler_type cosine
    --warmup_ratio 0.1
    --weight_decay 0.1
    --adam_beta2 0.95
    --logging_steps 10
    --eval_strategy steps
    --report_to none
)
case "$TASK" in
causal-lm)
    # A byte-level tokenizer and a small Llama, both new, learn Python from the standard library.
    DEFAULTS+=(--output_dir "$ROOT/outputs/quickstart")
    # Two million parameters on 1.4 million tokens: about four minutes on two cores.
    CPU_DEFAULTS=(
        --block_size 256
        --vocab_size 2048
        --model_config "llama:hidden_size=192,intermediate_size=512,num_hidden_layers=4,num_attention_heads=4,num_key_value_heads=4,tie_word_embeddings=true"
        --per_device_train_batch_size 4
        --max_steps 700
        --eval_steps 175
        --max_eval_samples 64
    )
    GPU_DEFAULTS=(
        --block_size 512
        --vocab_size 8192
        --model_config "llama:hidden_size=512,intermediate_size=1408,num_hidden_layers=8,num_attention_heads=8,num_key_value_heads=8,tie_word_embeddings=true"
        --per_device_train_batch_size 32
        --per_device_eval_batch_size 32
        --max_steps 1000
        --eval_steps 250
    )
    ;;
seq2seq)
    # A small T5, new as well, reads the bodies of the library's functions and writes the first
    # lines of their docstrings; ROUGE-L and exact match come from text that it generates.
    DEFAULTS+=(
        --output_dir "$ROOT/outputs/quickstart-seq2seq"
        --predict_with_generate true
        --max_target_length 24
    )
    # One million parameters, seven times through 6,500 functions: about four minutes on two cores.
    CPU_DEFAULTS=(
        --max_source_length 64
        --vocab_size 2048
        --model_config "t5:d_model=128,d_kv=32,d_ff=384,num_layers=2,num_heads=4,feed_forward_proj=gated-gelu,dropout_rate=0.1"
        --per_device_train_batch_size 16
        --per_device_eval_batch_size 16
        --max_steps 1500
        --eval_steps 500
    )
    GPU_DEFAULTS=(
        --max_source_length 256
        --vocab_size 4096
        --model_config "t5:d_model=384,d_kv=64,d_ff=1024,num_layers=4,num_heads=6,feed_forward_proj=gated-gelu,dropout_rate=0.1"
        --per_device_train_batch_size 32
        --per_device_eval_batch_size 32
        --max_steps 2000
        --eval_steps 500
    )
    ;;
*) refuse "--task ${TASK:-(nothing)}: tasks are causal-lm, seq2seq" ;;
esac
# ---- end of defaults -----------------------------------------------------------------------------

dstrain_setup
dstrain_find_gpus

port="$(dstrain_free_port)"
# /dev/null: no hostfile, where a cluster has one in the place that DeepSpeed looks at by itself.
launch=("${DEEPSPEED[@]}" --quiet --no_local_rank --hostfile /dev/null --master_port "$port")
if ((NUM_GPUS == 0)); then
    export DS_ACCELERATOR=cpu
    # Each process would else start a thread for every core, and they would fight for them.
    cores="$(getconf _NPROCESSORS_ONLN)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}"
    launch+=(--num_gpus 2) # processes, here
    flags=("${CPU_DEFAULTS[@]+"${CPU_DEFAULTS[@]}"}")
    dstrain_build_ops shm_comm
    say "No GPU found: training on 2 CPU processes."
else
    # DeepSpeed follows CUDA_VISIBLE_DEVICES only where no number is given.
    [[ -n ${CUDA_VISIBLE_DEVICES:-} ]] || launch+=(--num_gpus "$NUM_GPUS")
    flags=("${GPU_DEFAULTS[@]+"${GPU_DEFAULTS[@]}"}")
    [[ $GPUS_HAVE_BF16 != true ]] || flags+=(--bf16 true)
    dstrain_build_ops # none, but locks of killed builds go
    say "Training on $NUM_GPUS GPU(s)."
fi

dstrain_take_token "$@"
dstrain_run_job "${launch[@]}" --module dstrain train "$TASK" \
    "${DEFAULTS[@]}" ${flags[@]+"${flags[@]}"} ${WORDS[@]+"${WORDS[@]}"}

#!/usr/bin/env bash
# Train on the machines of a hostfile (see launch/hostfile.example).
#
#   bash launch/multi_node.sh HOSTFILE [training flags]
#
# Every machine needs this repository and its .venv at the same path: on a shared disk, or by
# `bash launch/setup.sh` on each. Paths in the training flags start from the repository.
#
# With ssh (no NODE_RANK): run it once, on any machine that reaches the others by ssh without a
# password; needs pdsh here. Without ssh: run the same line on every machine, with its own number:
#
#   NODE_RANK=0 MASTER_ADDR=worker-0 bash launch/multi_node.sh HOSTFILE [training flags]   # line 1
#   NODE_RANK=1 MASTER_ADDR=worker-0 bash launch/multi_node.sh HOSTFILE [training flags]   # line 2
#
# for instance under Slurm, with one task per node:
#
#   srun --ntasks-per-node=1 bash -c 'NODE_RANK=$SLURM_NODEID bash launch/multi_node.sh HOSTFILE ...'
#
# where HOSTFILE names the nodes in Slurm's order (`scontrol show hostnames`).

set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# ---- variables, all optional ---------------------------------------------------------------------

# The task to train.
TASK="${TASK:-causal-lm}"

# This machine's place in the hostfile, from 0. Setting it selects the way without ssh.
NODE_RANK="${NODE_RANK:-}"

# Address of the first machine of the hostfile as all others reach it; all ranks meet there. Found
# by itself from the first line; set it where that machine has several networks.
MASTER_ADDR="${MASTER_ADDR:-}"

# A port that is free on that machine and open to the others.
MASTER_PORT="${MASTER_PORT:-29500}"

# The port of the ssh servers, where it is not ssh's default.
SSH_PORT="${SSH_PORT:-}"

# More options of ssh, for the checks below as for the launch: "-i KEY -o StrictHostKeyChecking=no".
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-}"

# What each machine gets to know of this shell's environment. ssh passes none of it on; DeepSpeed
# passes on PYTHON*, on NVIDIA GPUs NCCL*, and the KEY=VALUE lines of its environment file. This
# script hands it such a file with the variables below that are set, and then the lines of your own
# (DS_ENV_FILE, or .deepspeed_env in your home and in the repository), which win. They appear in the process list
# of every machine, so keep tokens and keys out: log in on the machines instead.
PASSED_ON=(
    # The network interface that carries the training, such as eth0 or ib0. Set them where a machine
    # has several: a wrong guess shows as a hang, or a refused connection, at the very start.
    NCCL_SOCKET_IFNAME # for GPUs
    GLOO_SOCKET_IFNAME # for CPUs, and for what GPU runs exchange on the CPU
    NCCL_IB_HCA        # which InfiniBand adapters to use
    NCCL_IB_DISABLE    # 1: sockets, although there is InfiniBand
    NCCL_DEBUG         # INFO: NCCL says which network it took
    # DeepSpeed.
    DS_ACCELERATOR       # cpu: train without GPUs
    DS_LOG_LEVEL         # INFO: all that DeepSpeed has to say
    HF_DATASETS_CACHE    # where prepared data is kept; a disk of each machine or a shared one
    TORCH_EXTENSIONS_DIR # where the compiled ops are; set by launch/setup.sh
    # The rest.
    OMP_NUM_THREADS # CPU threads of each rank
    HF_HOME         # where models and data sets are cached
    HF_HUB_OFFLINE  # 1: use that cache alone
    WANDB_MODE      # offline: keep what is logged on the machine
)

# ---- the hostfile --------------------------------------------------------------------------------

# Fill HOSTS from the hostfile, or say what is wrong in which line.
read_hostfile() {
    local file="$1" line number=0 host slots
    local -A seen=()
    HOSTS=()
    [[ -e $file ]] || die "hostfile $file does not exist; $ROOT/launch/hostfile.example shows what goes in"
    [[ -f $file && -r $file ]] || die "hostfile $file is no file that can be read"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line="${line%$'\r'}"
        [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
        [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([0-9]+)[[:space:]]*(#.*)?$ ]] ||
            die "$file, line $number: expected 'NAME slots=NUMBER', found '$line'"
        host="${BASH_REMATCH[1]}" slots="${BASH_REMATCH[2]}"
        ((10#$slots > 0)) || die "$file, line $number: $host has no slots; leave the line out"
        [[ -z ${seen[$host]:-} ]] || die "$file, line $number: $host is in line ${seen[$host]} already"
        seen[$host]=$number
        HOSTS+=("$host")
    done <"$file"
    ((${#HOSTS[@]} > 0)) || die "$file names no machine; $ROOT/launch/hostfile.example shows what goes in"
}

# ---- the other machines --------------------------------------------------------------------------

on_host() {
    local more=()
    read -r -a more <<<"$PDSH_SSH_ARGS_APPEND"
    ssh -o BatchMode=yes -o ConnectTimeout=10 ${SSH_PORT:+-p "$SSH_PORT"} \
        ${more[@]+"${more[@]}"} "$@" </dev/null
}

# DeepSpeed tries one machine, without the options above, and no path: a run fails later and darkly.
check_hosts() {
    local host status bad=0
    for host in "${HOSTS[@]}"; do
        status=0
        on_host "$host" "test -f '$ROOT/pyproject.toml' && test -x '$VENV/bin/deepspeed'" || status=$?
        case $status in
            0) ;;
            255) bad=1 && say "$host: no ssh without a password (see above; SSH_PORT and PDSH_SSH_ARGS_APPEND may help)" ;;
            *) bad=1 && say "$host: no repository with a .venv at $ROOT; share the disk, or run 'bash launch/setup.sh' in a copy at that path" ;;
        esac
    done
    ((bad == 0)) || die "not all ${#HOSTS[@]} machines are ready. Where there is no ssh, start each by itself: see NODE_RANK in $0"
}

# Print an address of the first machine that is not its own name for itself (127.0.0.1).
find_master_addr() {
    local host="${HOSTS[0]#*@}" found
    found="$(getent ahostsv4 "$host" | awk '$1 !~ /^127\./ { print $1; exit }' || true)"
    if [[ -z $found && -z $NODE_RANK ]]; then
        # An alias of ssh, or the machine itself.
        found="$(on_host "${HOSTS[0]}" hostname -I | awk '{ print $1 }' || true)"
    fi
    [[ -n $found ]] || die "no address known for $host, the first machine; set MASTER_ADDR"
    echo "$found"
}

# Print the environment file for DeepSpeed, which stops at a blank line and takes a comment for code.
write_env() {
    local name file line number
    for name in "${PASSED_ON[@]}"; do
        [[ -z ${!name+set} ]] || printf '%s=%s\n' "$name" "${!name}"
    done
    for file in "$@"; do
        number=0
        [[ -f $file ]] || continue
        while IFS= read -r line || [[ -n $line ]]; do
            number=$((number + 1))
            [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
            [[ $line =~ ^[[:space:]]*[A-Za-z_][A-Za-z_0-9]*= ]] ||
                die "$file, line $number: expected KEY=VALUE, found '$line'"
            printf '%s\n' "$line"
        done <"$file"
    done
}

# ---- launch --------------------------------------------------------------------------------------

(($# > 0)) || die "which hostfile? Usage: bash $0 HOSTFILE [training flags]"
read_hostfile "$1"
hostfile="$(realpath "$1")"
shift

dstrain_take_token "$@"
if ((${#WORDS[@]} != $#)); then
    # ssh would carry it in a command too, which every user of every machine can read.
    [[ -n $NODE_RANK || ${#HOSTS[@]} -eq 1 ]] ||
        die "--hub_token: a token cannot be handed on by ssh unseen. Log in with 'hf auth login' on ${HOSTS[0]}, which uploads, and leave it out"
    set -- ${WORDS[@]+"${WORDS[@]}"}
fi

if [[ -n $NODE_RANK ]]; then
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ && $NODE_RANK -lt ${#HOSTS[@]} ]] ||
        die "NODE_RANK=$NODE_RANK: expected 0 to $((${#HOSTS[@]} - 1)), as $hostfile names ${#HOSTS[@]} machine(s)"
elif ((${#HOSTS[@]} > 1)); then
    command -v pdsh >/dev/null || die "pdsh is missing (on Debian and Ubuntu: apt-get install pdsh). Where it cannot be had, start each machine by itself: see NODE_RANK in $0"
    command -v ssh >/dev/null || die "ssh is missing (on Debian and Ubuntu: apt-get install openssh-client)"
fi

dstrain_setup
dstrain_build_ops # none, but locks of killed builds go

launch=(deepspeed --quiet --no_local_rank --hostfile "$hostfile" --master_port "$MASTER_PORT")
if [[ -n $NODE_RANK ]]; then
    launch+=(--no_ssh --node_rank "$NODE_RANK")
elif ((${#HOSTS[@]} == 1)); then
    say "One machine in $hostfile: DeepSpeed starts its ranks here, without ssh."
    launch+=(--no_ssh_check)
else
    check_hosts
    # The checks are done, and DeepSpeed's own would not use the options of ssh above. Leave out
    # --venv_script: with it, DeepSpeed 0.19.8 cannot stop the ranks (its pkill gets another word).
    launch+=(--no_ssh_check ${SSH_PORT:+--ssh_port "$SSH_PORT"})
    # shellcheck disable=SC2034  # for dstrain_run_job
    RANKS_ELSEWHERE=1
fi
[[ -n $MASTER_ADDR ]] || MASTER_ADDR="$(find_master_addr)"
launch+=(--master_addr "$MASTER_ADDR")

# A file of our own beside yours, never in its place.
env_file="$(mktemp)"
trap 'rm -f "$env_file"' EXIT
if [[ -n ${DS_ENV_FILE:-} ]]; then
    own=("$HOME/$DS_ENV_FILE" "$DS_ENV_FILE")
else
    own=("$HOME/.deepspeed_env" "$ROOT/.deepspeed_env")
fi
write_env "${own[@]}" >"$env_file"
export DS_ENV_FILE="$env_file"

# The machines change to this folder before they start.
cd "$ROOT"
dstrain_run_job "${launch[@]}" --module dstrain train "$TASK" "$@"

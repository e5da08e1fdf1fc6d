#!/usr/bin/env bash
# Train on the machines of a hostfile (see launch/hostfile.example).
#
#   bash launch/multi_node.sh HOSTFILE [training flags]
#
# Every machine needs this repository and its .venv at the same path: on a shared disk, or by
# `bash launch/setup.sh` on each. Paths in the training flags start from the repository.
#
# With ssh (no NODE_RANK): run it once, on any machine that reaches the others by ssh without a
# password. Every line of output has the name of its machine before it. TERM, INT, HUP and USR1 to
# this script reach the ranks of all machines, which save and end; no other run is touched. When a
# machine fails or is out of reach, the others end too. The exit status is that of the ranks: 75
# after a signal and a checkpoint, else that of the machine that failed first, which is named (255
# where its connection broke). Without ssh: run the same line on every machine, with its own number:
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
source "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/setup.sh"

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

# More options of ssh, quoted as in a shell where need be: "-i KEY -o StrictHostKeyChecking=no".
# (PDSH_SSH_ARGS_APPEND, its name when this script needed pdsh, is read as well.)
SSH_OPTIONS="${SSH_OPTIONS-${PDSH_SSH_ARGS_APPEND:-}}"

# How long a machine may be out of reach of this one before it is given up, and stops its ranks.
LINK_SECONDS="${LINK_SECONDS:-60}"

# How long a machine may take from the begin of the connection until it answers, before any starts;
# no less than LINK_SECONDS.
START_SECONDS="${START_SECONDS:-120}"

# How long ranks may take to save and end when another machine has failed or is out of reach; then
# they are killed. A signal to this script sets no limit; a second Ctrl-C kills.
STOP_SECONDS="${STOP_SECONDS:-120}"

# What each machine gets to know of this shell's environment, of which ssh passes nothing on: the
# variables below that are set, all that begin with MLFLOW, MV2, NCCL, PYTHON or UCX, and then the
# KEY=VALUE lines of your own environment file (DS_ENV_FILE, or .deepspeed_env in your home and in
# the repository), which win. A value arrives as it stands: in that file too, nothing is expanded,
# and quotes are part of the value. No value appears in a list of processes.
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

MOST_SLOTS=4096 # more ranks than any machine runs

# Fill HOSTS and SLOTS from the hostfile, or say what is wrong in which line.
read_hostfile() {
    local file="$1" line number=0 host slots
    local -A seen=()
    HOSTS=() SLOTS=()
    [[ -e $file ]] || refuse "hostfile $file does not exist; $ROOT/launch/hostfile.example shows what goes in"
    [[ -f $file && -r $file ]] || refuse "hostfile $file is no file that can be read"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line="${line%$'\r'}"
        [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
        [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([0-9]+)[[:space:]]*(#.*)?$ ]] ||
            refuse "$file, line $number: expected 'NAME slots=NUMBER', found '$line'"
        host="${BASH_REMATCH[1]}" slots="${BASH_REMATCH[2]}"
        [[ $host != -* ]] || refuse "$file, line $number: the name of a machine cannot begin with '-', found '$host'"
        slots="${slots#"${slots%%[!0]*}"}" # without zeros before it
        [[ -n $slots ]] || refuse "$file, line $number: $host has no slots; leave the line out"
        ((${#slots} <= ${#MOST_SLOTS} && slots <= MOST_SLOTS)) ||
            refuse "$file, line $number: slots=$slots are too many for one machine; expected 1 to $MOST_SLOTS"
        [[ -z ${seen[$host]:-} ]] || refuse "$file, line $number: $host is in line ${seen[$host]} already"
        seen[$host]=$number
        HOSTS+=("$host")
        SLOTS+=("$slots")
    done <"$file"
    ((${#HOSTS[@]} > 0)) || refuse "$file names no machine; $ROOT/launch/hostfile.example shows what goes in"
}

# ---- the other machines --------------------------------------------------------------------------

# Print an address of the first machine that is not its own name for itself (127.0.0.1), or nothing.
find_master_addr() {
    getent ahostsv4 "${HOSTS[0]#*@}" | awk '$1 !~ /^127\./ { print $1; exit }' || true
}

# Fill ENVIRONMENT with the KEY=VALUE that each machine gets.
read_environment() {
    local name file line number own
    ENVIRONMENT=()
    for name in $(compgen -e | grep -E '^(MLFLOW|MV2|NCCL|PYTHON|UCX)' || true) "${PASSED_ON[@]}"; do
        [[ -z ${!name+set} ]] || ENVIRONMENT+=("$name=${!name}")
    done
    # There may be no HOME, as in a container or a job of a scheduler.
    own=(${HOME:+"$HOME/.deepspeed_env"} "$ROOT/.deepspeed_env")
    [[ -z ${DS_ENV_FILE:-} ]] || own=(${HOME:+"$HOME/$DS_ENV_FILE"} "$DS_ENV_FILE")
    for file in "${own[@]}"; do
        number=0
        [[ -f $file ]] || continue
        while IFS= read -r line || [[ -n $line ]]; do
            number=$((number + 1))
            [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
            [[ $line =~ ^[[:space:]]*([A-Za-z_][A-Za-z_0-9]*)=[[:space:]]*(.*)$ ]] ||
                refuse "$file, line $number: expected KEY=VALUE, found '$line'"
            name="${BASH_REMATCH[1]}" line="${BASH_REMATCH[2]}"
            line="${line%"${line##*[![:space:]]}"}" # without blanks at the end
            [[ ! $line =~ ^\".*\"$|^\'.*\'$|\$\{?[A-Za-z_] ]] ||
                say "warning: $file, line $number: the value of $name is taken as it stands, with its quotes and dollar signs"
            ENVIRONMENT+=("$name=$line")
        done <"$file"
    done
}

# Run the training on all machines from here (see ssh/front.py), in the place of this script.
run_over_ssh() {
    local number settings=()
    [[ -n $MASTER_ADDR ]] || MASTER_ADDR="$(find_master_addr)"
    settings=(
        "root=$ROOT" "task=$TASK" "master_addr=$MASTER_ADDR" "master_port=$MASTER_PORT"
        "ssh_port=$SSH_PORT" "ssh_options=$SSH_OPTIONS"
        "link_seconds=$LINK_SECONDS" "start_seconds=$START_SECONDS" "stop_seconds=$STOP_SECONDS"
    )
    for number in "${!HOSTS[@]}"; do
        settings+=("host=${HOSTS[number]} ${SLOTS[number]}")
    done
    settings+=(${ENVIRONMENT[@]+"${ENVIRONMENT[@]/#/set=}"})
    exec "$VENV/bin/python" -E -X utf8 "$ROOT/launch/ssh/front.py" "$@" < <(printf '%s\0' "${settings[@]}")
}

# ---- launch --------------------------------------------------------------------------------------

case "${1:-}" in
-h | --help) usage ;;
esac
(($# > 0)) || refuse "which hostfile? Usage: bash $0 HOSTFILE [training flags]"
read_hostfile "$1"
hostfile="$(realpath -- "$1")"
shift

dstrain_take_token "$@"
if ((${#WORDS[@]} != $#)); then
    # It would be handed to every machine, of which one uploads.
    [[ -n $NODE_RANK || ${#HOSTS[@]} -eq 1 ]] ||
        refuse "--hub_token: a token is not handed to other machines. Log in with 'hf auth login' on ${HOSTS[0]}, which uploads, and leave it out"
    set -- ${WORDS[@]+"${WORDS[@]}"}
fi

for port in MASTER_PORT SSH_PORT; do
    [[ -z ${!port} || (${!port} =~ ^[1-9][0-9]{0,4}$ && ${!port} -le 65535) ]] ||
        refuse "$port=${!port}: expected the number of a port, 1 to 65535"
done

if [[ -n $NODE_RANK ]]; then
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]{0,5})$ && $NODE_RANK -lt ${#HOSTS[@]} ]] ||
        refuse "NODE_RANK=$NODE_RANK: expected 0 to $((${#HOSTS[@]} - 1)), as $hostfile names ${#HOSTS[@]} machine(s)"
elif ((${#HOSTS[@]} > 1)); then
    command -v ssh >/dev/null || refuse "ssh is missing (on Debian and Ubuntu: apt-get install openssh-client). Where it cannot be had, start each machine by itself: see NODE_RANK in $0"
    for seconds in LINK_SECONDS START_SECONDS STOP_SECONDS; do
        [[ ${!seconds} =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$seconds=${!seconds}: expected a number of seconds"
    done
fi

# The ops are in .venv, unless the environment file that the launching machine has read says else.
own_extensions="${DSTRAIN_OVER_SSH:+${TORCH_EXTENSIONS_DIR:-}}"
dstrain_setup
[[ -z $own_extensions ]] || export TORCH_EXTENSIONS_DIR="$own_extensions"

if [[ -z $NODE_RANK ]] && ((${#HOSTS[@]} > 1)); then
    read_environment
    run_over_ssh "$@"
fi

dstrain_build_ops # none, but locks of killed builds go
[[ -n $MASTER_ADDR ]] || MASTER_ADDR="$(find_master_addr)"
launch=("${DEEPSPEED[@]}" --quiet --no_local_rank --hostfile "$hostfile" --master_port "$MASTER_PORT")
if [[ -n $NODE_RANK ]]; then
    [[ -n $MASTER_ADDR ]] || refuse "no address known for ${HOSTS[0]}, the first machine; set MASTER_ADDR"
    launch+=(--no_ssh --node_rank "$NODE_RANK")
else
    say "One machine in $hostfile: DeepSpeed starts its ranks here, without ssh."
    MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
    launch+=(--no_ssh_check)
fi
launch+=(--master_addr "$MASTER_ADDR")

# Paths in the flags start from here.
cd -- "$ROOT"
dstrain_run_job "${launch[@]}" --module dstrain train "$TASK" "$@"

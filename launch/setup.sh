#!/usr/bin/env bash
# The environment of dstrain: a virtual environment in .venv at the top of the repository, with the
# versions of constraints.txt, and DeepSpeed's compiled ops inside it.
#
#   bash launch/setup.sh [extra ...]     set up by hand, with extras of pyproject.toml such as `dev`
#
# The other scripts here source this file and call its functions. All of it is skipped, in well
# under a second, where it has been done. PYTHON names the python to make the environment with.

set -euo pipefail

# The path of this file without links: one to a script leads here, from wherever it is.
ROOT="$(dirname -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")")"
VENV="$ROOT/.venv"

# DeepSpeed's launcher. By its own name the system could not start it where the path of the
# environment has a blank in it, or is too long for a #! line.
# shellcheck disable=SC2034  # for the scripts that source this file
DEEPSPEED=("$VENV/bin/python" "$VENV/bin/deepspeed")

say() { printf '[dstrain] %s\n' "$*" >&2 || true; }

# End with the status of a failure.
die() {
    say "error: $*"
    exit 1
}

# End with the status of a mistake of the user: in arguments or environment, with its remedy.
refuse() {
    say "error: $*"
    exit 2
}

# Print what is said at the top of the script that was started, and end.
usage() {
    sed -n '2,${ /^#/!q; s/^# \{0,1\}//p; }' <"$0"
    exit 0
}

# ---- what comes before the job -------------------------------------------------------------------

# Print the processes that a process has started, and those that these have.
descendants() {
    local child
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
        echo "$child"
        descendants "$child"
    done
}

# Tell whether one of some processes has not ended.
any_runs() {
    local pid line
    for pid; do
        line=""
        { read -r line <"/proc/$pid/stat"; } 2>/dev/null || true
        line="${line##*) }" # behind the name, which may hold anything
        [[ -z $line || $line == [ZX]* ]] || return 0
    done
    return 1
}

# Ask for the end of the command of `interruptible`, whose variables this sees, and of all that it
# has started: ninja gives each compiler a process group of its own.
# shellcheck disable=SC2086  # several words
end_command() {
    local how=TERM
    ! ((caught == 2 && interrupted++)) || how=KILL # Ctrl-C again: no more waiting
    tree="$tree ${command_pid:-} $(descendants "${command_pid:-0}")"
    kill -"$how" $tree 2>/dev/null || true
}

# Run a command that may take long. A signal ends it, all that it has started, and this shell, which
# by itself would die alone. The command stays in this process group: pip may ask the terminal.
interruptible() {
    local command_pid="" status=0 caught=0 interrupted=0 tree="" waited
    trap 'caught=1; end_command' HUP
    trap 'caught=2; end_command' INT
    trap 'caught=15; end_command' TERM
    trap 'caught=10; end_command' USR1
    { true <&0; } 2>/dev/null || exec </dev/null # it may be closed
    {
        # Ctrl-C and a hangup come to the whole group: what ends of them by itself would leave
        # unknown processes behind.
        trap '' HUP INT USR1
        "$@"
    } <&0 &
    command_pid=$!
    ((!caught)) || end_command
    # A trap ends `wait` early.
    while :; do
        wait "$command_pid" && status=0 || status=$?
        kill -0 "$command_pid" 2>/dev/null || break
    done
    if ((caught)); then
        # shellcheck disable=SC2086  # several words
        for ((waited = 0; waited < 100; waited++)); do
            any_runs $tree || break
            sleep 0.1 || true
        done
        # shellcheck disable=SC2086
        ! any_runs $tree || kill -KILL $tree 2>/dev/null || true
        say "ended by SIG$(kill -l "$caught"), before the job has begun"
        exit $((128 + caught))
    fi
    trap - HUP INT TERM USR1
    return "$status"
}

# ---- the virtual environment ---------------------------------------------------------------------

# Print a python that can make the environment.
find_python() {
    local candidate no_venv=""
    # 3.11 first: it is the one that constraints.txt was tried with.
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        no_venv="$candidate"
    done
    [[ -z $no_venv ]] || refuse "$no_venv has no venv module (on Debian and Ubuntu: apt-get install python3-venv)"
    refuse "no Python 3.11 or later found; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# What the installation depends on; a change of any of it installs again.
setup_hash() {
    { cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" && echo "$ROOT" && readlink -f "$VENV/bin/python"; } |
        sha256sum | cut -d ' ' -f 1
}

# Tell whether the system can start a script: its #! line names a program, in not too many bytes.
can_start() {
    local LC_ALL=C line=""
    [[ -x $1 ]] || return 1
    IFS= read -r line <"$1" || true
    [[ $line == '#!'* ]] || return 0
    line="${line#'#!'}"
    ((${#line} < 125)) && [[ -f ${line%% *} && -x ${line%% *} ]]
}

# Tell whether dstrain is installed with these extras, for the present pyproject.toml and
# constraints.txt.
is_set_up() {
    local hash extra
    [[ -x $VENV/bin/python ]] || return 1
    can_start "$VENV/bin/deepspeed" || return 1
    can_start "$VENV/bin/dstrain" || return 1
    hash="$(setup_hash)"
    for extra in base "$@"; do
        [[ "$(cat "$VENV/.dstrain-setup/$extra" 2>/dev/null)" == "$hash" ]] || return 1
    done
    "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("dstrain"), m.version("torch")' 2>/dev/null
}

pip_install() {
    # On a terminal pip shows its progress; in a log only its errors are of use.
    local quiet=()
    [[ -t 2 ]] || quiet=(--quiet --quiet)
    "$VENV/bin/python" -m pip --disable-pip-version-check install ${quiet[@]+"${quiet[@]}"} \
        --constraint "$ROOT/constraints.txt" "$@" >&2
}

# Let the system start the scripts in bin that pip has given a #! line with a blank in its path, or a
# longer one than it reads. pip minds that for entry points, but not for scripts such as `deepspeed`.
mend_scripts() {
    "$VENV/bin/python" - "$VENV/bin" <<'END'
import os, pathlib, shutil, sys

folder = pathlib.Path(sys.argv[1])
for path in folder.iterdir():
    if path.is_symlink() or not path.is_file():
        continue
    first, _, rest = path.read_bytes().partition(b"\n")
    python = first[2:].strip()
    if first[:2] != b"#!" or not python.startswith(os.fsencode(folder / "python")):
        continue
    if b" " in python or len(first) > 126:
        mended = path.with_name(path.name + ".mended")
        # Read by sh as a command, and by Python as text.
        mended.write_bytes(b"#!/bin/sh\n'''exec' \"%s\" \"$0\" \"$@\"\n' '''\n%s" % (python, rest))
        shutil.copymode(path, mended)
        mended.replace(path)
END
}

install() {
    local started=$SECONDS extra extras python hash
    if ! "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$(find_python)"
        say "Making the virtual environment $VENV with $("$python" --version) ..."
        "$python" -m venv "$VENV" || die "$VENV could not be made; see above"
    fi
    if ! "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
        # By itself and first: where a CPU-only build is on offer its version sorts above the one
        # with CUDA, and what else asks for torch is then content with it.
        say "Installing torch (hundreds of megabytes, once) ..."
    fi
    pip_install torch || die "torch could not be installed; see above"
    extras="$(IFS=,; echo "$*")"
    say "Installing dstrain${extras:+ with $extras} and what it needs (minutes the first time) ..."
    pip_install --editable "$ROOT${extras:+[$extras]}" || die "dstrain could not be installed; see above"
    mend_scripts
    mkdir -p "$VENV/.dstrain-setup"
    hash="$(setup_hash)"
    for extra in base "$@"; do
        echo "$hash" >"$VENV/.dstrain-setup/$extra"
    done
    say "Installed in $((SECONDS - started)) s."
}

# Print the extras of pyproject.toml, a line each.
known_extras() {
    sed -n '/^\[project\.optional-dependencies\]/,/^\[/ s/^\([A-Za-z0-9_-]*\) *=.*/\1/p' "$ROOT/pyproject.toml"
}

# Install unless another process has done so by now: two set-ups at once would install over each
# other. The lock goes with the processes that have it.
install_in_turn() {
    {
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            say "Waiting for another set-up of $VENV ..."
            flock 9
        fi
        is_set_up "$@" || install "$@"
    } 9>"$VENV/.dstrain-setup.lock"
}

# Install where that is to be done, and make this shell use the environment. Arguments: extras.
dstrain_setup() {
    local extra known
    known="$(known_extras)"
    for extra; do
        [[ $'\n'"$known"$'\n' == *$'\n'"$extra"$'\n'* ]] ||
            refuse "there is no extra named '$extra'; pyproject.toml has ${known//$'\n'/, }"
    done
    [[ -z ${TMPDIR:-} || (-d $TMPDIR && -w $TMPDIR) ]] ||
        refuse "TMPDIR=$TMPDIR is no folder that can be written to; name another one, or unset TMPDIR"
    if ! is_set_up "$@"; then
        mkdir -p "$VENV"
        interruptible install_in_turn "$@"
    fi
    export VIRTUAL_ENV="$VENV"
    # DeepSpeed's builds call `ninja` by name. It has to be this one: another release, such as the
    # system's, would compile again all that this one did.
    export PATH="$VENV/bin:$PATH"
    # Ops of its own: environments that share a folder rebuild each other's.
    export TORCH_EXTENSIONS_DIR="$VENV/torch_extensions"
    # Warnings and errors, without a page of information from every rank.
    export DS_LOG_LEVEL="${DS_LOG_LEVEL:-WARNING}"
}

# ---- DeepSpeed's ops -----------------------------------------------------------------------------

# Remove locks that killed builds left, which would make every run wait for ever; build the ops named
# (see dstrain/engine/ops.py) where they are not built.
# shellcheck disable=SC2120  # it may be called with none
dstrain_build_ops() {
    interruptible run_ops "$@"
}

run_ops() {
    cd -- "$ROOT"
    # Run as a file, so that asking takes no time for the imports of the package around it.
    exec python -c 'import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name="__main__")' \
        "$ROOT/dstrain/engine/ops.py" "$@"
}

# ---- the machine ---------------------------------------------------------------------------------

# Set NUM_GPUS, and GPUS_HAVE_BF16 to `true` or `false`. DS_ACCELERATOR=cpu hides the GPUs.
dstrain_find_gpus() {
    # shellcheck disable=SC2034  # for the scripts that source this file
    NUM_GPUS=0 GPUS_HAVE_BF16=false
    [[ ${DS_ACCELERATOR:-} != cpu ]] || return 0
    # shellcheck disable=SC2034
    read -r NUM_GPUS GPUS_HAVE_BF16 < <(python -c '
import torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(gpus, str(gpus > 0 and torch.cuda.is_bf16_supported(including_emulation=False)).lower())') ||
        die "torch cannot be imported; see above, or delete $VENV and run this again"
}

dstrain_free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Set WORDS to the training flags given, without the token of --hub_token: the launcher prints its
# command, which every user of the machine can read as well. The ranks get it as HF_TOKEN.
dstrain_take_token() {
    WORDS=()
    while (($#)); do
        case "$1" in
            --hub[_-]token=* | --push[_-]to[_-]hub[_-]token=*) export HF_TOKEN="${1#*=}" ;;
            --hub[_-]token | --push[_-]to[_-]hub[_-]token)
                if (($# > 1)); then
                    export HF_TOKEN="$2"
                    shift
                else
                    WORDS+=("$1") # without a value, which is an error
                fi
                ;;
            *) WORDS+=("$1") ;;
        esac
        shift
    done
}

# Pass on what comes in, until it has nobody to read it; then drop it. No signal ends this early.
drain() {
    trap '' PIPE INT TERM HUP USR1
    cat 2>/dev/null || cat >/dev/null
}

# Where the output of this shell goes into a pipe whose reader may leave (`| head`), put a process
# between that goes on reading: a launcher or library may end of a closed pipe, its ranks with it.
drain_pipes() {
    if [[ -p /dev/fd/2 && /dev/fd/2 -ef /dev/fd/1 ]]; then
        exec > >(drain) 2>&1
        return
    fi
    [[ ! -p /dev/fd/1 ]] || exec > >(drain)
    [[ ! -p /dev/fd/2 ]] || exec 2> >(drain >&2)
}

# The ranks of this machine that have begun, by their own word, and have not ended. This function
# and the next are for dstrain_run_job, whose variables they see.
living_ranks() {
    local file pid
    for file in "$folder"/rank-?*; do
        [[ -f $file && $file != *.new ]] || continue
        pid="$(<"$file")"
        ! kill -0 "$pid" 2>/dev/null || echo "$pid"
    done
}

# Ask for the end of the job: of its ranks, which save, end, and so end their launchers. DeepSpeed's
# launcher, when asked itself, kills what has not saved in 30 seconds and forgets its status.
stop_job() {
    local ranks
    if ((caught == 2 && interrupted++)); then # Ctrl-C again: no more waiting
        kill -KILL -- "-$job" 2>/dev/null || true
        return
    fi
    ranks="$(living_ranks)"
    if [[ -n $ranks ]]; then
        # TERM for Ctrl-C as well, for which libraries print tracebacks.
        # shellcheck disable=SC2086  # several words
        kill -TERM $ranks 2>/dev/null || true
    else
        kill -TERM -- "-$job" 2>/dev/null || true
    fi
}

# The status of the job, by that of `deepspeed` and what the ranks of this machine have said: it is
# 0 where DeepSpeed's launcher was killed, and some other where ranks had saved and ended with 75.
status_of_job() {
    local status="$1" file said worst=0 number_ended=0
    for file in "$folder"/status-?*; do
        [[ -f $file && $file != *.new ]] || continue
        said="$(<"$file")"
        number_ended=$((number_ended + 1))
        [[ $said != 75 ]] || return 75
        ((said == 0)) || worst=$said
    done
    if ((caught && worst > 128)); then
        status=$((128 + caught)) # before the first step, so that there was nothing to save
    elif ((worst > 0)); then
        ((status > 0)) || status=$worst
    elif ((number_ended == 0)) && ((caught)); then
        status=$((128 + caught)) # before there was anything to save
    elif ((status == 0 && number_ended == 0)); then
        status=1 # whatever launched the ranks has been killed
    fi
    return "$status"
}

# Run a job and return its exit status: 75 where a signal ended it after a checkpoint was saved.
# `deepspeed` passes no signal on and dies alone: so it gets a process group, this shell passes on
# the signals that it gets, and the ranks end by themselves when one of these processes is gone.
dstrain_run_job() {
    local job folder status=0 caught=0 interrupted=0 waited
    folder="$(mktemp -d)" || die "no folder could be made in ${TMPDIR:-/tmp}; TMPDIR may name another place"
    export DSTRAIN_JOB="$folder" DSTRAIN_SCRIPT=$$
    drain_pipes
    set -m # puts the next line into a process group of its own
    "$@" </dev/null &
    job=$!
    set +m
    trap '' PIPE
    trap 'caught=1; stop_job' HUP
    trap 'caught=2; stop_job' INT
    trap 'caught=15; stop_job' TERM
    trap 'caught=10; stop_job' USR1
    # A trap ends `wait` early.
    while :; do
        wait "$job" && status=0 || status=$?
        kill -0 "$job" 2>/dev/null || break
    done
    if [[ -n "$(living_ranks)" ]] || { ((status > 128)) && kill -0 -- "-$job" 2>/dev/null; }; then
        ((caught)) || say "the launcher has ended with status $status before its ranks: they save where they can"
        stop_job
        while [[ -n "$(living_ranks)" ]]; do
            sleep 0.2 || true
        done
    fi
    if ((caught || status > 128)); then
        # What is left ends soon: DeepSpeed's launcher looks once a second, and ranks that have not
        # begun to train at once; on other machines they have the 30 seconds that it leaves them.
        for ((waited = 0; waited < 400; waited++)); do
            kill -0 -- "-$job" 2>/dev/null || break
            sleep 0.1 || true
        done
        kill -KILL -- "-$job" 2>/dev/null || true
    fi
    trap - INT TERM HUP USR1
    status_of_job "$status" && status=0 || status=$?
    rm -rf "$folder"
    return "$status"
}

# A file that is sourced may return. (Its name tells less: `source "$0"` is no wish to install.)
if ! (return 0 2>/dev/null); then
    case "${1:-}" in
    -h | --help) usage ;;
    esac
    dstrain_setup "$@"
    say "Ready: source $(printf %q "$VENV/bin/activate")"
fi

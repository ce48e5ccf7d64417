# env.sh: finds or makes the Python environment of this project. Sourced by quickstart.sh and run_tests.sh; not run.
#
# `telechat_env [EXTRA ...]` leaves the interpreter in PYTHON, and its folder first on PATH. It takes, in this order:
#   1. the interpreter that TELECHAT_PYTHON names;
#   2. the current python, if mindspore and mindformers import in it (an Ascend image, say);
#   3. .venv in the checkout, created with a Python 3.9 to 3.12 if there is none yet.
# 1 and 2 belong to the user: what is installed there stays as it is, only what is missing is added.

TELECHAT_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
TELECHAT_VENV=$TELECHAT_ROOT/.venv
TELECHAT_NEEDED_GB=5       # a fresh .venv takes 3.4 GB, and pip needs room to unpack
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

telechat_say() { printf '%s\n' "[environment] $*"; }

telechat_die() {
    printf 'error: %s\n' "$1" >&2
    shift
    local line
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

# Is $1 a Python that the wheels of mindspore exist for?
telechat_version_fits() {
    "$1" -c 'import sys; sys.exit(not ((3, 9) <= sys.version_info[:2] <= (3, 12) and sys.maxsize > 2**32))' \
        >/dev/null 2>&1
}

# A .venv that was moved still runs, but its scripts (msrun, pip) name the old place.
telechat_venv_works() {
    "$TELECHAT_VENV/bin/python" -c '' 2>/dev/null && grep -qF "$TELECHAT_VENV" "$TELECHAT_VENV/bin/activate" 2>/dev/null
}

telechat_can_make_venv() { "$1" -c 'import venv, ensurepip' >/dev/null 2>&1; }

# Prints the interpreter that .venv is to be made from. 3.11 first: it is the one that the project is developed with.
telechat_find_python() {
    local name path without_venv="" seen=""
    for name in python3.11 python3.10 python3.12 python3.9 python3 python; do
        path=$(command -v "$name") || continue
        seen="$seen $path ($("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo broken))"
        telechat_version_fits "$path" || continue
        if telechat_can_make_venv "$path"; then
            printf '%s\n' "$path"
            return
        fi
        without_venv=${without_venv:-$path}
    done
    if [ -n "$without_venv" ]; then
        telechat_die "$without_venv has no venv module, so .venv cannot be made." \
            "Debian, Ubuntu: apt-get install $(basename "$without_venv")-venv (or python3-venv); then run this again."
    fi
    telechat_die "no Python 3.9 to 3.12 found, and mindspore 2.9.0 has wheels for no other; found:${seen:- none}." \
        "Install one and run this again, for example:" \
        "  Debian, Ubuntu: apt-get install python3.11 python3.11-venv" \
        "  openEuler, Fedora: dnf install python3.11" \
        "  conda: conda create -n telechat python=3.11 && conda activate telechat" \
        "or name an interpreter: TELECHAT_PYTHON=/path/to/python"
}

telechat_check_disk() {
    local free_kb
    free_kb=$(df -Pk "$TELECHAT_ROOT" 2>/dev/null | awk 'NR == 2 { print $4 }')
    if [ -n "$free_kb" ] && [ "$free_kb" -lt $((TELECHAT_NEEDED_GB * 1024 * 1024)) ]; then
        telechat_die "the installation needs about $TELECHAT_NEEDED_GB GB in $TELECHAT_ROOT," \
            "and $((free_kb / 1024)) MB are free there. Make room, or clone to another disk."
    fi
}

# telechat_pip LOG ARGS...: pip in $PYTHON with a line for each large file, everything else in LOG.
telechat_pip() {
    local log=$1 line start=$SECONDS
    shift
    "$PYTHON" -m pip "$@" </dev/null 2>&1 | tee "$log" | while IFS= read -r line; do
        line=${line#"${line%%[![:space:]]*}"}
        case $line in
            Downloading*MB\)* | Using\ cached*MB\)*)
                printf '  %4d s  %s\n' $((SECONDS - start)) "${line%% --*}" ;;
            Installing\ collected*)
                printf '  %4d s  Installing %d packages\n' $((SECONDS - start)) "$(tr -dc ',' <<<"$line,," | wc -c)" ;;
        esac
    done
    return "${PIPESTATUS[0]}"
}

telechat_pip_failed() {
    local hint="Full output: $1"
    if grep -qi 'No space left' "$1"; then hint="The disk is full. $hint"; fi
    if grep -qi 'externally-managed' "$1"; then
        hint="This Python belongs to the operating system: use a virtual environment, or unset TELECHAT_PYTHON. $hint"
    fi
    if grep -qiE 'Temporary failure in name resolution|Connection (refused|timed out)|ConnectTimeout|ProxyError' "$1"; then
        hint="The package index was not reached: check the network, or pip's proxy and index settings. $hint"
    fi
    tail -n 8 "$1" | sed 's/^/  /' >&2
    telechat_die "pip could not install the dependencies (its last lines are above)." "$hint"
}

# telechat_import PYTHON: the versions of mindspore and mindformers, or what Python says about their import.
telechat_import() {
    local logs status
    logs=$(mktemp -d "${TMPDIR:-/tmp}/telechat.XXXXXX")    # mindformers makes its log folder when it is imported
    # The libraries may print warnings; the versions are the last line.
    LOG_MF_PATH=$logs "$1" -c 'import mindspore, mindformers as m; print(mindspore.__version__, m.__version__)' 2>&1 |
        tail -n 1
    status=${PIPESTATUS[0]}
    rm -rf "$logs"
    return "$status"
}

telechat_check_import() {
    local versions
    versions=$(telechat_import "$PYTHON") ||
        telechat_die "mindspore and mindformers are installed for $PYTHON but do not import:" "$versions"
    telechat_say "mindspore and mindformers $versions import."
}

# Extras without which everything but their own tests runs, so that a failure to install them is no reason to stop.
telechat_optional="torch peft evaluation serve constrained clients"

telechat_without() {   # what misses without extra $1
    case $1 in
        torch) echo "tests of .bin checkpoints" ;;
        peft) echo "a test with PEFT" ;;
        evaluation) echo "tests with lm-evaluation-harness" ;;
        serve) echo "the server (telechat serve) and its tests" ;;
        constrained) echo "tests of answers in JSON" ;;
        clients) echo "tests with the server's clients" ;;
    esac
}

# The user's own interpreter: only add what is missing.
telechat_use_own() {
    PYTHON=$1
    shift
    local extra extras=() optional=()
    for extra in "$@"; do
        case $extra in serve | constrained | clients) optional+=("$extra") ;; *) extras+=("$extra") ;; esac
    done
    telechat_version_fits "$PYTHON" || telechat_die "$PYTHON is not a 64-bit Python 3.9 to 3.12." \
        "Unset TELECHAT_PYTHON and another one is looked for."
    telechat_say "using $PYTHON ($("$PYTHON" --version 2>&1)) as it is."
    local missing=() line log
    while IFS= read -r line; do
        if [ -n "$line" ]; then missing+=("$line"); fi
    done < <("$PYTHON" "$TELECHAT_ROOT/scripts/requirements.py" cpu ${extras[@]+"${extras[@]}"})
    if [ ${#missing[@]} -gt 0 ]; then
        telechat_say "adding what it lacks: ${missing[*]}"
        log=$(mktemp "${TMPDIR:-/tmp}/telechat-pip.XXXXXX")
        telechat_pip "$log" install "${missing[@]}" || telechat_pip_failed "$log"
        rm -f "$log"
        telechat_check_import
    fi
    local before=" ${missing[*]-} "
    for extra in ${optional[@]+"${optional[@]}"}; do
        missing=()
        while IFS= read -r line; do
            case "$before" in *" $line "*) ;; *) if [ -n "$line" ]; then missing+=("$line"); fi ;; esac
        done < <("$PYTHON" "$TELECHAT_ROOT/scripts/requirements.py" "$extra")
        if [ ${#missing[@]} -eq 0 ]; then continue; fi
        telechat_say "adding for $(telechat_without "$extra"): ${missing[*]}"
        log=$(mktemp "${TMPDIR:-/tmp}/telechat-pip.XXXXXX")
        telechat_pip "$log" install "${missing[@]}" ||
            telechat_say "that could not be installed ($(tail -n 1 "$log")): $(telechat_without "$extra") will miss."
        rm -f "$log"
    done
}

# .venv: made on the first call; a stamp remembers what is installed, so that later calls take no time.
telechat_use_venv() {
    local start=$SECONDS found stamp hash extra installed="" missing=""
    stamp=$TELECHAT_VENV/telechat.stamp
    hash=$(cd "$TELECHAT_ROOT" && cat setup.cfg setup.py pyproject.toml constraints.txt | cksum)
    PYTHON=$TELECHAT_VENV/bin/python
    if [ -e "$stamp" ] && telechat_venv_works && [ "$(head -n 1 "$stamp")" = "$hash" ]; then
        installed=$(tail -n +2 "$stamp" | tr '\n' ' ')
    fi
    for extra in base "$@"; do
        case " $installed " in *" $extra "*) ;; *) missing="$missing $extra" ;; esac
    done
    if [ -z "$missing" ]; then return; fi

    telechat_check_disk
    if [ -e "$TELECHAT_VENV" ] && ! telechat_venv_works; then
        [ -e "$TELECHAT_VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$TELECHAT_VENV")" ] ||
            telechat_die "$TELECHAT_VENV is no virtual environment; move it away and run this again."
        telechat_say ".venv does not work (moved, or its Python is gone): creating it again."
        rm -rf "$TELECHAT_VENV"
    fi
    if [ ! -e "$TELECHAT_VENV" ]; then
        found=$(telechat_find_python) || exit 1
        telechat_say "making .venv from $found ($("$found" --version 2>&1))."
        "$found" -m venv "$TELECHAT_VENV" || telechat_die "$found -m venv $TELECHAT_VENV failed (see above)."
    fi
    local log=$TELECHAT_VENV/install.log list
    rm -f "$stamp"
    # An editable installation needs pip 21.3, the test of the wheel 22.3 (pip --python).
    if ! "$PYTHON" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (22, 3))'; then
        telechat_pip "$log" install --upgrade pip || telechat_pip_failed "$log"
    fi
    telechat_say "installing the pinned dependencies into .venv (a few minutes the first time, about 3.4 GB)."
    list=$(echo "$installed" "$@" | tr ' ' '\n' | grep -vxF "$(tr ' ' '\n' <<<"base $telechat_optional")" | grep -v '^$' |
        sort -u | paste -sd, -)
    (cd "$TELECHAT_ROOT" && telechat_pip "$log" install -c constraints.txt -e ".[cpu${list:+,$list}]") ||
        telechat_pip_failed "$log"
    telechat_check_import
    installed="base ${list//,/ }"
    local name what
    for name in $telechat_optional; do
        case " $* " in *" $name "*) ;; *) continue ;; esac
        what=$(telechat_without "$name")
        if [ "$name" = peft ] && ! grep -qw torch <<<"$installed"; then continue; fi    # it would bring CUDA's torch
        telechat_say "installing the extra $name, for $what."
        if (cd "$TELECHAT_ROOT" && telechat_pip "$log.$name" install -c constraints.txt -e ".[$name]"); then
            installed="$installed $name"
        else
            tail -n 3 "$log.$name" | sed 's/^/  /'
            telechat_say "$name could not be installed (above): $what will skip or miss."
        fi
    done
    { echo "$hash"; tr -s ' ' '\n' <<<"$installed"; } >"$stamp.part" && mv "$stamp.part" "$stamp"
    telechat_say "ready after $((SECONDS - start)) s."
}

telechat_env() {
    local current error
    if [ -n "${TELECHAT_PYTHON:-}" ]; then
        current=$(command -v "$TELECHAT_PYTHON") ||
            telechat_die "TELECHAT_PYTHON=$TELECHAT_PYTHON is no program that can be run."
        current=$(cd "$(dirname "$current")" && pwd)/$(basename "$current")
        telechat_use_own "$current" "$@"
    else
        current=$(command -v python3 || command -v python || true)
        if [ -n "$current" ] && [ "$current" != "$TELECHAT_VENV/bin/python3" ] && (
            cd "$TELECHAT_ROOT" && "$current" -c 'import importlib.util as u, sys
sys.exit(not (u.find_spec("mindspore") and u.find_spec("mindformers")))' 2>/dev/null
        ); then
            if error=$(telechat_import "$current"); then
                telechat_use_own "$current" "$@"
            else
                telechat_say "$current has mindspore and mindformers, but they do not import: $error"
                telechat_say "using .venv instead; TELECHAT_PYTHON=$current insists on this one."
                telechat_use_venv "$@"
            fi
        else
            telechat_use_venv "$@"
        fi
    fi
    # msrun starts its workers with the word `python`; without this they would run in another one.
    PATH=$(dirname "$PYTHON"):$PATH
    PYTHONPATH=$TELECHAT_ROOT${PYTHONPATH:+:$PYTHONPATH}
    export PATH PYTHONPATH PYTHON
}

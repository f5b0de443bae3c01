# Makes or uses an environment and installs what the project needs. Source it:
#
#     source setup.sh && python grpo.py --arm projected --m 16 --seed 0
#
# Inside an active virtual environment (or conda's) that one is used; otherwise .venv is made here. Where there is no
# NVIDIA card the CPU build of torch is taken: the ordinary one for Linux brings gigabytes of CUDA libraries with it.
# PGRPO_EXTRAS names the extras (default: test; on a GPU machine: test,vllm). Versions are those of constraints.txt, but with
# vLLM, which pins what it needs by itself.

_pgrpo_setup() {
    local root stamp extras lock
    root="$(cd "$(dirname "${BASH_SOURCE[0]:-$1}")" && pwd)"
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x "$root/.venv/bin/python" ] || python3 -m venv "$root/.venv" || return 1
        . "$root/.venv/bin/activate"
    fi
    if command -v nvidia-smi >/dev/null 2>&1; then extras="${PGRPO_EXTRAS:-test,vllm}"; else extras="${PGRPO_EXTRAS:-test}"; fi
    stamp="$(python -c 'import sys; print(sys.prefix)')/.pgrpo-$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum | cut -d' ' -f1)-$extras"
    [ -e "$stamp" ] && return 0
    if ! python -c 'import sys, importlib.metadata as m; sys.exit(not m.version("torch").startswith("2.13.0"))' 2>/dev/null; then
        if command -v nvidia-smi >/dev/null 2>&1 || [ "$(uname)" = Darwin ]; then
            python -m pip install -q torch==2.13.0 || return 1
        else
            # A CPU build that pip is pointed at already; else uv knows where PyTorch keeps its own.
            python -m pip install -q torch==2.13.0+cpu 2>/dev/null ||
                { python -m pip install -q uv && python -m uv pip install -q --torch-backend cpu torch==2.13.0; } || return 1
        fi
    fi
    case "$extras" in *vllm*) lock=() ;; *) lock=(-c "$root/constraints.txt") ;; esac
    python -m pip install -q "${lock[@]}" -e "$root[$extras]" && touch "$stamp"
}
_pgrpo_setup "$0"

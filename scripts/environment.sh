# Sourced by the other scripts: go to the project, use its virtual environment (made on first use, unless one is
# active already), and install what FILE lists where that changed.
#
#     . "$(dirname "$0")/environment.sh" requirements.txt

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: expected python3 to be Python 3.11 or newer, found $(python3 -V 2>&1)" >&2; exit 2; }
        python3 -m venv .venv || { echo "error: python3 -m venv failed; install python3 with venv" >&2; exit 2; }
    fi
    . .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/.pdd-$1"
if ! cmp -s <(cat requirements*.txt) "$stamp"; then
    echo "installing $1 into $VIRTUAL_ENV" >&2
    # A connection that breaks must not end the set-up: try a second time.
    python -m pip install -q -r "$1" || python -m pip install -q -r "$1" ||
        { echo "error: pip could not install $1; check the network and run this again" >&2; exit 2; }
    cat requirements*.txt >"$stamp"
fi

#!/usr/bin/env bash
# Set up as scripts/quickstart.sh does, then lint and run the tests, two files at once. Arguments go to pytest:
# -m "not slow" adds the whole runs, such as the quickstarts, -m slow runs what takes many minutes.
set -euo pipefail
. "$(dirname "$0")/environment.sh" requirements-dev.txt
ruff check .
ruff format --check .
lint-imports
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

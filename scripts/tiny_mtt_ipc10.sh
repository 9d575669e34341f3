#!/usr/bin/env bash
# PDD+MTT on Tiny ImageNet, 10 images per class in 5 stages; experts, distillation, evaluation. See --help.
set -eu
exec python "$(dirname "$0")/reproduce.py" tiny-mtt-ipc10 "$@"

"""Imported first by the scripts: Ctrl-C while the other modules are imported ends the process without a traceback."""

import signal
import sys

if "pytest" not in sys.modules:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

"""The liveness checker as a command: ``python -m tests.faults.liveness_checker [SECONDS]``.

The same as ``liverank bench liveness --seconds SECONDS``; see loadtest/liveness/check.py for what it decides.
"""

from __future__ import annotations

import sys

from loadtest.liveness.run import run_liveness

if __name__ == "__main__":
    sys.exit(run_liveness(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0))

"""liverank's server. `__main__` is the command, `app` builds the parts, `engine` runs them."""

import os

# One BLAS thread, set before NumPy is first imported: the engine thread's matrix products are small, and a
# second thread spinning for them takes the core that decodes requests (measured: docs/lab.md).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

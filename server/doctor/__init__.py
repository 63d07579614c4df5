"""`liverank doctor`: can this machine, with these settings, serve? Every finding comes with its mend.

`base` is the contract; one file per area holds its checks; `run` lists them and prints what they found.
"""

from server.doctor.run import run_doctor

__all__ = ["run_doctor"]

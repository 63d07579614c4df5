"""Replay: real livestream history through the real API, with the file's own clock."""

from loadtest.replay.run import run_replay

__all__ = ["run_replay"]

"""`liverank demo`: a live platform goes in, a ranked feed of truly live streams comes out."""

from loadtest.demo.run import run_demo

__all__ = ["run_demo"]

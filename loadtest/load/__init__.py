"""`liverank load`: plays a scenario against a running server and records what callers saw.

scenario (a checked file) → schedule (when what is due) → run: calls, publisher, prober, actions → record (JSON).
"""

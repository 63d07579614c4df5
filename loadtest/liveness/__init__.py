"""The liveness checker: traffic against a real server, its history on record, and a pure judge over that history."""

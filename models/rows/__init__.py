"""From the event log to dataset files (`models.schema`), through the server's own table and feature function.

source (log or history file → records) → cursor (the table as of a record; the only reader of features)
  → impressions | streams (which moments, labels joined later) → build (one machine) | sharded (Ray) → audit
"""

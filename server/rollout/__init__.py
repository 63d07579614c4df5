"""Other versions of a model into service: push, shadow, canary, promote, rollback; see docs/models.md."""

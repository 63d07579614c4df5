"""Which streams grow in the next 15 minutes: a recipe for history files, and its evaluation.

``rows`` (what was known at each minute, and what came) → ``features`` (numbers of one stream as of that minute) →
``labels`` (what is learned) → ``net`` and ``fit`` → ``export`` (ONNX) → ``evaluate`` (against every formula).
docs/models.md says how good it is and how that was measured.
"""

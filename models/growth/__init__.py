"""Which streams grow in the next 15 minutes: recipes for history files, and their evaluation.

``rows`` (what was known at each minute, and what came) → ``features`` (numbers of one stream as of that minute) → what
is learned: ``labels`` and ``net`` (growth-1: the chance to be in the next top ten), or ``outlook`` and ``outlook_net``
(growth-2: what may become of a stream) → ``fit`` → ``graph`` and ``export`` (ONNX) → ``score`` → ``evaluate`` (against
every formula). docs/evaluation.md says how good they are and how that was measured.
"""

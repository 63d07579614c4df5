"""Offline: makes the trendiness model that the server's scorers load. Never imported by the server.

    python -m models.train            # model_repository/trendiness/1/ and config.pbtxt

telling (who tells what) → replay (a world through the server's own table and features) → dataset (rows, and
labels joined later; what is predicted: target) → fit (trendiness: the net; calibration) → evaluation → export.

Of a real log: rows (`liverank replay --out`, see docs/datasets.md) → schema (columns of the files), labels (what they
mean).
"""

"""`liverank replay --out ROWS.parquet`: the command, and what it says."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time

from models.rows.audit import audit
from models.rows.build import Plan, build
from models.rows.source import open_source
from server.config import load_settings
from server.errors import ConfigError
from server.live.features import FeatureSet


def run_rows(options: argparse.Namespace) -> int:
    """Writes a dataset file; prints, last, a line of JSON.

    Raises:
        ConfigError: settings, arguments or files are wrong. LogError: the log is damaged or incomplete. LeakError: a
        row knew its future.
    """
    for name, least in (("every_minutes", 1), ("shards", 1), ("audit", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: at least {least} wanted, got {getattr(options, name)}")
    settings = load_settings(options.config)
    features = FeatureSet.load(settings.table.features_file)
    source = open_source(options.file, options.log, settings)
    plan = Plan(options.rows, options.every_minutes)
    began_s = time.monotonic()
    if options.ray is None:
        built = build(source, features, plan, options.out, _say)
    else:
        from models.rows.sharded import build_on_ray

        built = build_on_ray(source, features, plan, options.out, options.ray, options.shards, _say)
    said = dataclasses.asdict(built) | {"path": str(built.path), "seconds": round(time.monotonic() - began_s, 1)}
    if options.audit:
        said["audited"] = audit(options.out, source, features, options.audit)
    print(f"{built.rows} rows of {plan.kind} in {built.path}")
    for why, count in built.told.items():
        print(f"left out, {why}: {count}")
    print(json.dumps(said))
    return 0


def _say(line: str) -> None:
    print(f"replay: {line}", file=sys.stderr, flush=True)

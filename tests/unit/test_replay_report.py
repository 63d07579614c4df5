"""What a replay says last, and when it was not sound."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from loadtest.replay.growth import Overlap
from loadtest.replay.player import Tally
from loadtest.replay.report import Outcome, print_outcome


def outcome(tally: Tally, *faults: str) -> Outcome:
    return Outcome(3, 1, 1, 2.0, tally, Overlap(), {"viewers_now": Overlap()}, 0, faults)


@pytest.mark.parametrize(
    ("tally", "faults", "sound"),
    [
        (Tally(events=4, accepted=4), (), True),
        (Tally(events=4, accepted=3, rejected=Counter(TOO_LATE=1)), (), True),
        (Tally(events=4, accepted=3), (), False),
        (Tally(events=4, accepted=4, shown_after_end=1), (), False),
        (Tally(events=4, accepted=4), ("the engine gave up",), False),
    ],
)
def test_a_replay_is_sound_when_every_event_is_accounted_for_and_nothing_ended_was_shown(
    tally: Tally, faults: tuple[str, ...], sound: bool
) -> None:
    assert outcome(tally, *faults).sound is sound


def test_the_last_line_is_json_whatever_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(outcome(Tally(events=4, accepted=3, rejected=Counter(TOO_LATE=1)), "[odd] fault"))
    lines = capsys.readouterr().out.splitlines()
    said = json.loads(lines[-1])
    assert said["events_per_s"] == 2 and said["rejected"] == {"TOO_LATE": 1} and said["faults"] == ["[odd] fault"]
    assert said["overlap10"] == {"viewers": None, "absolute_growth": None, "relative_growth": None}
    assert "fault: [odd] fault" in lines

"""Scenario files: what they may say, how a wrong one is told, and which servers a load may go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtest.load.run import check_target
from loadtest.load.scenario import Scenario, load_scenario, parse_scenario, shipped
from server.__main__ import main
from server.errors import ConfigError

PHASE = {"name": "one", "duration_s": 10, "calls_per_s": 5}


def scenario(*phases: dict[str, Any], **keys: Any) -> Scenario:
    return parse_scenario({"name": "t", "phase": list(phases), **keys}, "t.toml")


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_scenario_is_valid_documented_and_short_enough_to_try(name: str) -> None:
    found = load_scenario(name)
    assert found.name == name and len(found.about) > 20
    assert 20 <= found.duration_s <= 120 and found.calls.count > 100 and found.events.count > 100


def test_all_the_promised_scenarios_are_shipped() -> None:
    assert shipped() == ["evening", "hot_reload", "mass_end", "raid", "ramp", "spike", "steady"]


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        ({"calls_per_sec": 5}, "phase.0.calls_per_sec: Extra inputs are not permitted"),
        ({"calls_per_s": -1}, "phase.0.calls_per_s: Input should be greater than or equal to 0"),
        ({"duration_s": 0}, "phase.0.duration_s: Input should be greater than 0"),
        ({"mix": {"liking": 1}}, "phase.0.mix.liking"),
        ({"mix": {"liked": 0}}, "mix: at least one weight above 0 wanted"),
        ({"check_live_share": 0.7, "rank_batch_share": 0.7}, "must not exceed 1"),
        ({"action": [{"do": "end", "at_s": 1}]}, "phase.0.action.0.end.share: Field required"),
        ({"action": [{"do": "stop", "at_s": 1}]}, "'end', 'start', 'raid', 'reload_rules', 'swap_model'"),
        ({"action": [{"do": "end", "at_s": 11, "share": 1}]}, "action.0.at_s (11.0) counts from the begin"),
        ({"calls_per_s": 90_000, "duration_s": 3_000}, "calls of all phases: at most 2,000,000 allowed"),
        ({"calls_per_s": 0}, "at least one call in the whole scenario wanted"),
    ],
)
def test_a_wrong_key_is_told_with_its_place_and_what_is_allowed(phase: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        scenario(PHASE | phase)
    assert str(error.value).startswith("t.toml: ") and told in str(error.value)


def test_a_scenario_without_phases_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least one \[\[phase\]\] wanted"):
        scenario()


def test_actions_are_on_the_time_of_the_whole_run_in_order() -> None:
    late, early = {"do": "start", "at_s": 9, "streams": 3}, {"do": "reload_rules", "at_s": 2}
    found = scenario(PHASE | {"action": [late, early]}, PHASE | {"action": [early]})
    assert [(at_s, action.do) for at_s, action in found.actions] == [
        (2.0, "reload_rules"), (9.0, "start"), (12.0, "reload_rules"),
    ]  # fmt: skip


def test_a_scaled_scenario_has_the_same_shape() -> None:
    whole = load_scenario("evening")
    part = whole.scaled(time_scale=0.5, rate_scale=2.0)
    assert part.duration_s == pytest.approx(whole.duration_s / 2)
    assert part.calls.count == pytest.approx(whole.calls.count, abs=1)
    assert [at_s for at_s, _ in part.actions] == pytest.approx([at_s / 2 for at_s, _ in whole.actions])
    with pytest.raises(ConfigError, match="time scale"):
        whole.scaled(time_scale=0.0)


@pytest.mark.parametrize("address", ["127.0.0.1:7710", "localhost:1", "[::1]:7710"])
def test_this_machine_may_be_loaded(address: str) -> None:
    check_target(address, allow_remote=False)


def test_another_machine_is_loaded_only_when_the_user_says_so() -> None:
    with pytest.raises(ConfigError, match=r"another machine \(192\.0\.2\.7\).*--allow-remote"):
        check_target("192.0.2.7:7710", allow_remote=False)
    check_target("192.0.2.7:7710", allow_remote=True)


@pytest.mark.parametrize("address", ["7710", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:x"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT wanted"):
        check_target(address, allow_remote=True)


def test_the_command_tells_what_is_wrong_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "no-such", "--self"]) == 2
    assert "none of evening, hot_reload" in capsys.readouterr().err
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[[phase]\n")
    assert main(["load", str(wrong), "--self"]) == 2
    assert str(wrong) in capsys.readouterr().err
    assert main(["load", "steady", "--target", "192.0.2.7:7710"]) == 2
    assert "--allow-remote" in capsys.readouterr().err

"""Decoders meet what nobody meant to send: every input that once broke one, and random changes of good ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.run import mutate
from tests.fuzz.targets import CORPUS, TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_well_formed_input_is_accepted(name: str) -> None:
    assert any(TARGETS[name].run(data) for data in TARGETS[name].make_seeds()), "the seeds reach nothing"


@pytest.mark.parametrize("name", TARGETS)
def test_what_once_broke_a_decoder_is_decoded_or_refused(name: str) -> None:
    for data in TARGETS[name].seeds():
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_input_is_decoded_or_refused(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.sampled_from(seeds), st.integers(0, 2**32))
    def changed(data: bytes, seed: int) -> None:
        target.run(mutate(data, np.random.default_rng(seed), target.max_bytes))

    @settings(max_examples=30, deadline=None, database=None)
    @given(st.binary(max_size=300))
    def anything(data: bytes) -> None:
        target.run(data)

    changed()
    anything()


def test_the_corpus_holds_inputs_of_known_targets_only_and_stays_small() -> None:
    files = [file for file in CORPUS.rglob("*") if file.is_file() and file.name != ".gitkeep"]
    assert {file.parent.name for file in files} <= set(TARGETS)
    assert sum(file.stat().st_size for file in files) < 200_000

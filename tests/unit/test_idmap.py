"""Stream ids find their slots, whatever was inserted and deleted before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.idmap import ID_BYTES, IdMap, hash_ids, id_words, pack_ids

IDS = st.binary(min_size=1, max_size=ID_BYTES)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=200))
def test_behaves_like_a_dict_under_inserts_and_deletes(steps: list[tuple[bool, int]]) -> None:
    """Few keys and a small map: probe runs collide and wrap, deletions close up behind them."""
    table_ids, lengths = np.zeros((32, ID_BYTES), np.uint8), np.zeros(32, np.uint8)
    id_map, model, free = IdMap(table_ids, lengths), {}, list(range(32))
    for insert, key in steps:
        name = b"stream-%d" % key
        if insert and name not in model and free:
            slot = free.pop()
            packed, length = pack_ids([name])
            table_ids[slot], lengths[slot] = packed[0], length[0]
            id_map.insert(slot)
            model[name] = slot
        elif not insert and name in model:
            slot = model.pop(name)
            id_map.delete(slot)
            lengths[slot] = 0
            free.append(slot)
    names = [b"stream-%d" % key for key in range(31)]
    assert id_map.lookup(*pack_ids(names)).tolist() == [model.get(name, -1) for name in names]


def test_ids_that_differ_only_in_trailing_zero_bytes_are_different_streams() -> None:
    names = [b"a", b"a\0", b"a\0\0"]
    table_ids, lengths = pack_ids(names)
    id_map = IdMap(table_ids, lengths)
    for slot in range(3):
        id_map.insert(slot)
    assert id_map.lookup(*pack_ids(names)).tolist() == [0, 1, 2]


def test_deleting_what_is_not_there_is_an_error() -> None:
    table_ids, lengths = pack_ids([b"a"])
    with pytest.raises(KeyError, match="slot 0"):
        IdMap(table_ids, lengths).delete(0)


def test_an_id_over_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 64 bytes"):
        pack_ids([b"x" * 65])


@given(st.lists(IDS, unique=True, max_size=50))
def test_hash_is_zero_for_the_empty_id_only(names: list[bytes]) -> None:
    hashes = hash_ids(*pack_ids([b"", *names]))
    assert hashes[0] == 0 and (hashes[1:] != 0).all()
    assert len(set(hashes.tolist())) == len(names) + 1


def test_words_compare_as_the_bytes_of_the_ids_do() -> None:
    rng = np.random.default_rng(1)
    ids = [rng.choice([1, 0x41, 0x7F, 0x80, 0xFF], rng.integers(1, 65)).astype(np.uint8).tobytes() for _ in range(300)]
    words = id_words(pack_ids(ids)[0])
    assert words.dtype == np.int64 and words.shape == (300, 8)
    assert sorted(range(300), key=lambda i: words[i].tolist()) == sorted(range(300), key=lambda i: ids[i])

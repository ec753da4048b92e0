"""What lies at a path is told without torch, and as the library tells it."""

from __future__ import annotations

from hypothesis import example, given, strategies as st

from fnrun.checkpoint import Entry
from fnrun.command.places import CHECKPOINT

names = st.from_regex(r"[0-9]{1,10}-[0-9]{1,10}(\.[0-9]{1,3})?", fullmatch=True)
entries = st.builds(Entry, *[st.integers(0, 10**9)] * 2, st.integers(0, 30)).map(lambda entry: entry.name)


@given(names | entries | st.text("0123456789-.\u0661", max_size=22))
@example("2024-11")
@example("00000005-00000005.0")
def test_the_names_of_checkpoints_are_those_that_the_library_knows(name):
    found, entry = CHECKPOINT.fullmatch(name), Entry.of(name)
    assert (found is None) == (entry is None)
    if found is not None and entry is not None:
        assert (int(found[2]), int(found[1]), int(found[3] or 0)) == entry

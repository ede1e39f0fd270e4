"""Tokens become text without half characters, without stop strings, and from any point of an answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chiron.engines.serve.prefix import PrefixCache
from chiron.engines.serve.text import TextStream, token_bytes

BYTES = [bytes([byte]) for byte in range(256)]


def test_a_character_waits_for_its_last_byte() -> None:
    stream = TextStream(BYTES)
    assert [stream.feed([byte]) for byte in "aé日".encode()] == ["a", "", "é", "", "", "日"]
    assert stream.flush() == ""


def test_bytes_that_are_no_text_become_replacement_characters_and_block_nothing() -> None:
    stream = TextStream(BYTES)
    assert stream.feed([0xFF, ord("a"), 0xE2]) == "\ufffda"
    assert stream.flush() == "\ufffd"


def test_the_text_ends_before_a_stop_string_wherever_it_is_cut() -> None:
    for cut in range(1, 11):
        stream = TextStream(BYTES, ["ENDE", "XX"])
        data = b"ab EN ENDE c"
        text = stream.feed(data[:cut]) + stream.feed(data[cut:]) + stream.flush()
        assert (text, stream.stopped) == ("ab EN ", True)


def test_what_could_begin_a_stop_string_is_held_and_given_back_at_the_end() -> None:
    stream = TextStream(BYTES, ["ENDE"])
    assert stream.feed(b"ab EN") == "ab "
    assert stream.flush() == "EN"


@given(st.binary(max_size=30), st.integers(0, 30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_a_stream_brought_to_a_point_goes_on_as_one_that_was_there(data: bytes, cut: int, stops: list[str]) -> None:
    whole, before, after = (TextStream(BYTES, stops) for _ in range(3))
    full = "".join(whole.feed([byte]) for byte in data) + whole.flush()
    first = "".join(before.feed([byte]) for byte in data[:cut])
    after.feed(data[:cut])
    assert first + "".join(after.feed([byte]) for byte in data[cut:]) + after.flush() == full


def test_sentencepiece_writes_spaces_and_lone_bytes_in_its_own_way() -> None:
    table = token_bytes({b"<0x0A>": 0, "▁hi".encode(): 1, b"</s>": 2}, {2})
    assert table == [b"\n", b" hi", b""]


def test_byte_level_tokens_are_their_bytes() -> None:
    assert token_bytes({b" hi": 1, b"\xff": 0, b"<|end|>": 2}, {2}) == [b"\xff", b" hi", b""]


def test_a_token_that_the_tokenizer_does_not_know_has_no_text() -> None:
    assert TextStream([b"a", b"b"]).feed([0, 7, 1]) == "ab"


def test_the_prefix_cache_finds_full_blocks_and_never_the_whole_prompt() -> None:
    cache = PrefixCache(block_tokens=4, blocks_max=8)
    cache.add(range(10))
    assert [cache.cached(list(range(n))) for n in (4, 5, 8, 9, 20)] == [0, 4, 4, 8, 8]
    assert cache.cached([9, *range(1, 10)]) == 0


def test_the_prefix_cache_forgets_what_was_unused_the_longest() -> None:
    cache = PrefixCache(block_tokens=4, blocks_max=4)
    for start in (0, 100, 0, 200):
        cache.add(range(start, start + 8))
    assert [cache.cached(list(range(start, start + 9))) for start in (0, 100, 200)] == [8, 0, 8]

"""Streaming must give exactly the text of decoding everything at once, whatever the tokens are."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from labinfer.errors import UsageError
from labinfer.runtime.detokenizer import byte_level_alphabet
from labinfer.runtime.tokenizer import Tokenizer

TEXTS = ["naïve café", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "你好，世界", "é è", "हिन्दी", "\ufffd", "a\r\n\tb", "𐍈"]


def _tokenizer(vocab: list[str], decoder: Any, special: str) -> Tokenizer:
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[], byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(special, special=True, normalized=False)])
    backend.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    size = backend.get_vocab_size()
    return Tokenizer(backend, vocab_size=size, bos_id=None, eos_ids=(), token_text={}, chat_templates={})


def _byte_level() -> Tokenizer:
    """All bytes, and runs of bytes that begin and end inside characters."""
    stand_in = {byte: character for character, byte in byte_level_alphabet().items()}
    pieces = [bytes([byte]) for byte in range(256)]
    for data in (text.encode() for text in TEXTS):
        pieces += [data[at : at + size] for size in (2, 3, 5) for at in range(len(data) - size)]
    vocab = dict.fromkeys("".join(stand_in[byte] for byte in piece) for piece in pieces)
    return _tokenizer(list(vocab), decoders.ByteLevel(), "<|end|>")


def _sentencepiece(strip: bool) -> Tokenizer:
    vocab = [f"<0x{byte:02X}>" for byte in range(256)] + [
        "▁",
        "▁▁",
        "▁Hello",
        "lo",
        "好",
        "é",
        "👍",
        "<0x",
        "\ufffd",
        "\n",
    ]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _tokenizer(vocab, decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip), "</s>")


def _word_piece() -> Tokenizer:
    return _tokenizer(["Hello", "##lo", "wor", "##ld", ".", "n't"], decoders.WordPiece(), "[SEP]")


TOKENIZERS = {
    "byte-level": _byte_level(),
    "sentencepiece": _sentencepiece(strip=True),
    "gemma": _sentencepiece(strip=False),
    "metaspace": _tokenizer(["▁Hello", "▁", "x", "▁a"], decoders.Metaspace(), "</s>"),
    "wordpiece": _word_piece(),
    "no decoder": _tokenizer(["a", "b", "é"], None, "</s>"),
}


def _streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> str:
    """Token by token, as which two runs of tokens give the same."""
    one, runs, middle = tokenizer.stream(prompt or ()), tokenizer.stream(prompt or ()), len(ids) // 2
    text = "".join(map(one.put, ids)) + one.finish()
    assert runs.put(*ids[:middle]) + runs.put(*ids[middle:]) + runs.finish() == text
    return text


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_streamed_parts_join_to_the_whole(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    size = tokenizer.vocab_size + 2  # the last two ids do not exist
    some = st.integers(0, size - 1)
    if kind in ("sentencepiece", "gemma"):  # spaces, words, odd bytes and whole characters in turn
        some = st.one_of(some, st.integers(240, size - 1), st.sampled_from([0xE4, 0xBD, 0xA0, 0x20]))
    ids = data.draw(st.lists(some, max_size=40))
    assert _streamed(tokenizer, ids) == tokenizer.decode(ids)


@given(text=st.text(max_size=60), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_text_cut_inside_characters_comes_back_whole(text: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stand_in = {byte: character for character, byte in byte_level_alphabet().items()}
    data = text.encode()
    vocab, ids, at, turn = tokenizer._backend, [], 0, 0
    while at < len(data):
        piece = data[at : at + cuts[turn % len(cuts)]]
        token = vocab.token_to_id("".join(stand_in[byte] for byte in piece))
        piece = piece if token is not None else piece[:1]
        ids.append(vocab.token_to_id("".join(stand_in[byte] for byte in piece)))
        at, turn = at + len(piece), turn + 1
    assert _streamed(tokenizer, ids) == text


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "wordpiece", "metaspace"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_after_a_prompt_the_text_continues_the_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    whole = [i for i in range(tokenizer.vocab_size) if "\ufffd" not in tokenizer.decode([i])]
    prompt = data.draw(st.lists(st.sampled_from(whole), min_size=1, max_size=24))
    ids = data.draw(st.lists(st.sampled_from(whole), max_size=12))
    before = tokenizer.decode(prompt)
    assert before + _streamed(tokenizer, ids, prompt) == tokenizer.decode(prompt + ids)


def test_a_character_begun_by_the_prompt_is_finished() -> None:
    for kind in ("byte-level", "sentencepiece"):
        tokenizer = TOKENIZERS[kind]
        if kind == "sentencepiece":
            byte_ids = list("你".encode())
        else:
            stand_in = {byte: character for character, byte in byte_level_alphabet().items()}
            byte_ids = [tokenizer._backend.token_to_id(stand_in[byte]) for byte in "你".encode()]
        assert _streamed(tokenizer, byte_ids[2:], byte_ids[:2]) == "你", kind


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stand_in = {byte: character for character, byte in byte_level_alphabet().items()}
    stream = tokenizer.stream()
    ids = [tokenizer._backend.token_to_id(stand_in[byte]) for byte in "a👍b".encode()]
    assert [stream.put(i) for i in ids] == ["a", "", "", "", "👍", "b"]
    broken = tokenizer.stream()
    assert [broken.put(ids[1]), broken.put(ids[1]), broken.finish()] == ["", "\ufffd", "\ufffd"]


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5, "1", None, [1]])
def test_what_is_no_token_id_is_refused(bad: Any) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    for use in (lambda: tokenizer.decode([bad]), lambda: tokenizer.stream().put(bad)):
        with pytest.raises(UsageError) as caught:
            use()
        assert caught.value.code == "tokenizer.token-id"


@pytest.mark.alone
def test_the_work_per_token_does_not_grow() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    stream = tokenizer.stream()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            stream.put(258)
        return time.perf_counter() - start

    seconds(200)
    first = seconds(2000)
    seconds(20_000)
    assert seconds(2000) < 5 * first


def test_the_byte_alphabet_is_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_level_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_level_alphabet().values()) == list(range(256))
    for character, byte in byte_level_alphabet().items():
        if byte < 0x80:
            assert decoders.ByteLevel().decode([character]) == chr(byte), json.dumps(character)

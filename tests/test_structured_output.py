"""Structured output: whatever the logits are, the answer has the form that was asked for."""

import json
import re
import resource
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from labinfer import SamplingParams
from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.sampling import SamplingRules, SamplingState, sample
from labinfer.runtime.sampling.grammar import MAX_GRAMMAR_CHARACTERS, vocabulary
from labinfer.runtime.tokenizer import Tokenizer

pytest.importorskip("llguidance")

PIECES = [
    "true",
    "false",
    "null",
    '{"',
    '":',
    '",',
    "name",
    "age",
    "é",
    "你好",
    "ab",
    "cd",
    "12",
    "  ",
    "\n",
    '"}',
    "]",
]


def byte_level() -> Tokenizer:
    """Every byte, some pieces, and an end; the last 30 rows of logits have no token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = ["".join(chr_of(byte) for byte in piece.encode()) for piece in PIECES]
    words = {word: place for place, word in enumerate(dict.fromkeys([*alphabet, *spelled]))}
    backend = Backend(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<tool>", special=True)])
    return made(backend)


def chr_of(byte: int) -> str:
    from labinfer.runtime.detokenizer import byte_level_alphabet

    return next(character for character, value in byte_level_alphabet().items() if value == byte)


def sentencepiece() -> Tokenizer:
    """Pieces with ▁ for a space, and byte tokens for everything else."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(piece.replace(" ", "▁") for piece in PIECES)]
    words += list('abcdefghijklmnopqrstuvwxyz0123456789{}[]",:.-_"')
    backend = Backend(
        models.BPE(vocab={w: n for n, w in enumerate(dict.fromkeys(words))}, merges=[], byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return made(backend)


def made(backend: Backend, ends: bool = True) -> Tokenizer:
    eos = [backend.token_to_id("<end>")] if ends else []
    size = backend.get_vocab_size(with_added_tokens=True)
    return Tokenizer(backend, vocab_size=size, bos_id=None, eos_ids=eos, token_text={}, chat_templates={})


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def answer(tokenizer: Tokenizer, seed: int, *, limit: int = 400, **structure: Any) -> str | None:
    """The text that random logits make under ``structure``; None where it did not end within ``limit`` tokens.

    What goes wrong with a row is raised.
    """
    rng = np.random.default_rng(seed)
    vocab_size = tokenizer.vocab_size + 30
    params = SamplingParams(temperature=1.5 if seed % 2 else 0, structured_outputs=structure, max_tokens=None)
    state = SamplingState(SamplingRules(params, vocab_size, tokenizer.eos_ids, tokenizer), seed)
    prompt = tokenizer.encode("a", add_special_tokens=False)
    decoder, text = tokenizer.stream(prompt), ""
    for _ in range(limit):
        logits = (rng.standard_normal((1, vocab_size)) * 3).astype(np.float32)
        logits[0, list(tokenizer.eos_ids)] += 2
        sampled = sample(logits, {0: state})
        for error in sampled.errors.values():
            raise error
        token = int(sampled.tokens[0])
        stop = state.accept(token)
        text += decoder.put(token) if stop is None or stop.in_text else ""
        if stop is not None:
            return text + decoder.finish()
    return None


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_json_always_validates(kind: str) -> None:
    texts = [answer(TOKENIZERS[kind], seed, json=SCHEMA) for seed in range(16)]
    done = [text for text in texts if text is not None]
    assert len(done) >= 10
    for text in done:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(done)) > 6


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_forms_always_hold(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    pattern = r"[a-c]{2,4}-(12|é|你好)+ ?[0-8]{3}"
    grammar = 'start: "(" start ")" | "x" | start "+" start'
    gbnf = 'root ::= "yes" | "no" " " root'
    for seed in range(12):
        found = answer(tokenizer, seed, regex=pattern)
        assert found is not None
        assert re.fullmatch(pattern, found), found
        choice = ["true", "trueab", 'say "é"', "😀\n\\", "\x01"]
        assert answer(tokenizer, seed, choice=choice) in choice
        text = answer(tokenizer, seed, grammar=grammar)
        assert text is None or re.fullmatch(r"[()x+]+", text)
        assert text is None or eval_free_balance(text)
        text = answer(tokenizer, seed, grammar=gbnf)
        assert text is None or re.fullmatch(r"(no )*yes", text)


def eval_free_balance(text: str) -> bool:
    depth = [text[: end + 1].count("(") - text[: end + 1].count(")") for end in range(len(text))]
    return min(depth) >= 0 and depth[-1] == 0


def test_an_answer_ends_with_its_grammar() -> None:
    assert {answer(TOKENIZERS["byte level"], seed, limit=4, regex="abcd|12") for seed in range(20)} == {"abcd", "12"}


def test_a_model_without_an_end_token_ends_with_its_grammar() -> None:
    tokenizer = made(TOKENIZERS["byte level"]._backend, ends=False)
    assert answer(tokenizer, 1, regex="abcd") == "abcd"


def test_forks_and_states_made_anew_stand_where_they_were() -> None:
    tokenizer = TOKENIZERS["byte level"]
    rules = SamplingRules(
        SamplingParams(structured_outputs={"regex": "(ab)+c|12"}), tokenizer.vocab_size, (), tokenizer
    )
    state = SamplingState(rules, 1)
    a, b, c = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "abc")
    fork = state.fork(1)
    for token in (a, b):
        assert state.accept(token) is None
    anew, late = SamplingState(rules, 1, output=[a, b]), state.fork(2)
    assert state.accept(c) == (None, True)
    zeros = np.zeros(tokenizer.vocab_size, np.float32)
    assert np.isfinite(fork.adjusted(zeros)).sum() == 4  # a, ab, 1 and 12
    assert (anew.adjusted(zeros) == late.adjusted(zeros)).all()
    assert np.isfinite(late.adjusted(zeros))[[a, c]].all()


def test_a_token_against_the_grammar_is_an_error_of_the_request() -> None:
    tokenizer = TOKENIZERS["byte level"]
    rules = SamplingRules(SamplingParams(structured_outputs={"regex": "ab"}), tokenizer.vocab_size, (), tokenizer)
    with pytest.raises(LabinferError) as caught:
        SamplingState(rules, 1, output=[5])
    assert caught.value.code == "sampling.grammar-failed"


def test_other_knobs_work_within_the_grammar() -> None:
    tokenizer = TOKENIZERS["byte level"]
    a, b = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "ab")
    knobs: dict[str, Any] = {"temperature": 0, "structured_outputs": {"regex": "[ab]*"}}
    size, eos = tokenizer.vocab_size, tokenizer.eos_ids
    row = np.zeros((1, size), np.float32)
    row[0, list(eos)] = 9
    for extra, expected in (
        ({}, min(eos)), ({"min_tokens": 1}, min(a, b)), ({"min_tokens": 1, "logit_bias": {max(a, b): 1}}, max(a, b)),
        ({"allowed_token_ids": [b]}, b), ({"min_tokens": 1, "bad_words": ["a"]}, b),
    ):  # fmt: skip
        state = SamplingState(SamplingRules(SamplingParams(**knobs, **extra), size, eos, tokenizer), 0)
        assert sample(row, {0: state}).tokens[0] == expected
    nothing = SamplingParams(temperature=0, structured_outputs={"regex": "a"}, allowed_token_ids=[b])
    state = SamplingState(SamplingRules(nothing, size, eos, tokenizer), 0)
    assert sample(row, {0: state}).errors[0].code == "sampling.no-token"


@pytest.mark.parametrize(
    "structure",
    [
        {"regex": "(((("}, {"regex": "a{5,2}"}, {"regex": "\ud800"}, {"grammar": "start: foo"}, {"grammar": ""},
        {"grammar": "start: " + "(" * 9000 + '"x"' + ")" * 9000}, {"grammar": "root ::= " + "(" * 9000},
        {"grammar": "root ::= 7"}, {"grammar": '%llguidance {"no_forcing": false}\nstart: "a"'},
        {"grammar": "\x00"}, {"json": "{"}, {"json": "3"}, {"json": {"type": "thing"}},
        {"json": {"$ref": "#/nowhere"}}, {"json": {"$ref": "https://example.org/schema"}},
        {"json": '{"items":' * 5000 + "{}" + "}" * 5000}, {"json": {"type": "string", "pattern": "(?=a)b"}},
        {"regex": "a" * (MAX_GRAMMAR_CHARACTERS + 1)}, {"choice": ["word"] * MAX_GRAMMAR_CHARACTERS},
    ],
    ids=lambda structure: str(structure)[:40],
)  # fmt: skip
def test_wrong_structures_are_usage_errors(structure: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    with pytest.raises(UsageError) as caught:
        SamplingRules(SamplingParams(structured_outputs=structure), tokenizer.vocab_size, (), tokenizer)
    assert caught.value.code in ("sampling.grammar", "sampling.params")
    assert "structured_outputs" in caught.value.message
    assert len(caught.value.message) < 400


def any_of(place: int) -> dict[str, Any]:
    """One of three objects with a property of its own."""
    names = [f"p{place}_{n}" for n in range(3)]
    return {"anyOf": [{"properties": {name: {"type": "integer"}}, "required": [name]} for name in names]}


HOSTILE: dict[str, dict[str, Any]] = {
    "3**12 objects": {"json": {"allOf": [any_of(place) for place in range(12)]}},
    "10**10 letters": {"regex": "((((a{100}){100}){100}){100}){100}"},
    "2**60 letters": {
        "grammar": "start: r0\n" + "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(60)) + '\nr60: "x"'
    },
    "10**8 texts": {"json": {"type": "array", "items": {"const": "text"}, "minItems": 10**8}},
    "many states": {"regex": "(.*a.{60}b)|(.*x.{300})"},
    "automata that multiply": {"regex": "|".join(f"[a-z]*{c}[a-z]{{20}}" for c in "abcdefghijklmnop")},
    "terminals that double": {
        "grammar": "start: T0\n" + "\n".join(f"T{n}: T{n + 1} T{n + 1}" for n in range(40)) + '\nT40: "x"'
    },
    "ambiguous": {"grammar": 'start: a a a a a a a a\na: a a | "x" | "xx" | '},
    "patterns that must all hold": {
        "json": {"allOf": [{"type": "string", "pattern": f"^[ab]*{'ab'[n % 2]}[ab]{{{n}}}"} for n in range(8, 20)]}
    },
    "many properties": {"json": {"properties": {f"p{n}": {"type": "string"} for n in range(2000)}}},
    "long": {"json": {"type": "array", "minItems": 10**6, "maxItems": 10**7}},
    "many choices": {"choice": [f"word {n}" for n in range(4000)]},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_structures_are_refused_or_stay_within_limits(name: str) -> None:
    """What a limit of llguidance stops is an error of the request; nothing takes long or fails otherwise."""
    tokenizer = TOKENIZERS["byte level"]
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        text = answer(tokenizer, 1, limit=100, **HOSTILE[name])
    except LabinferError as error:
        refused = error.code
    else:
        refused = ""
        assert text is None or isinstance(text, str)
    assert refused in ("", "sampling.grammar", "sampling.grammar-failed")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 20  # some of these would never end, or take all memory
    assert after.ru_maxrss - before.ru_maxrss < 400 << (20 if sys.platform == "darwin" else 10)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_the_bytes_that_the_detokenizer_gives(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode("a", add_special_tokens=False)
    rng = np.random.default_rng(0)
    strings = tokenizer.token_bytes(tokenizer.vocab_size + 3)
    assert strings[-3:] == [b""] * 3
    text_tokens = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.special_ids]
    for _ in range(200):
        ids = rng.choice(text_tokens, 8).tolist()
        data = b"".join(strings[token] for token in ids)
        try:
            expected = data.decode()
        except UnicodeDecodeError:
            continue
        decoder = tokenizer.stream(prompt)
        assert "".join(map(decoder.put, ids)) + decoder.finish() == expected


def test_a_vocabulary_is_made_once_and_goes_with_its_tokenizer() -> None:
    import gc
    import weakref

    tokenizer = byte_level()
    assert vocabulary(tokenizer, 300) is vocabulary(tokenizer, 300)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


def test_a_missing_llguidance_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = TOKENIZERS["byte level"]
    with pytest.raises(LabinferError) as caught:
        SamplingRules(SamplingParams(structured_outputs={"regex": "a"}), tokenizer.vocab_size, (), tokenizer)
    assert caught.value.remedy == "pip install 'labinfer[structured]'"

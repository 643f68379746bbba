"""Tokenizers from GGUF metadata and from tokenizer.json: Hugging Face's ids, and coded errors for broken files."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from labinfer import catalogue
from labinfer.errors import LabinferError, UsageError, WeightsError
from labinfer.runtime.gguf_tokenizer import _PRE, _SPLITS
from labinfer.runtime.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox doesn't jump 1234 times.\n\nOver   the lazy dog's naïve café, 你好世界 été 👍🏽 x=3+4;"
] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = "abc XYZ T'S'll don't 0123½²٣ \n\r\t  \u00a0.,!?-=(){}éàñ ǅ 你好ー 😀👩\u200d👧 e\u0301 𐍈<|im_end|>"


def _texts(count: int = 400) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randrange(40))) for _ in range(count)]


def _reference(pre: list[Any]) -> Backend:
    """A byte-level BPE tokenizer as its publisher would train it."""
    backend = Backend(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre or pre[-1] == "gpt2")
    backend.pre_tokenizer = pre_tokenizers.Sequence([*[p for p in pre if p != "gpt2"], level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _metadata(backend: Backend, **changes: Any) -> dict[str, Any]:
    """What a converter writes for ``backend``."""
    model = json.loads(backend.to_str())["model"]
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value for key, value in changes.items()},
    }


def _load(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.load("model.gguf", metadata)
    assert tokenizer is not None
    return tokenizer


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# The pre-tokenizers of the publishers' tokenizer.json, written with the library's own parts where they are.
PUBLISHED: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), "gpt2"],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), "gpt2"],
    "gpt-2": ["gpt2"],
    "olmo": ["gpt2"],
    "llama-bpe": [
        _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    ],
    "qwen2": [
        _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    ],
}


@pytest.mark.parametrize("pre", PUBLISHED)
def test_ids_of_the_published_pre_tokenizers(pre: str) -> None:
    reference = _reference(PUBLISHED[pre])
    tokenizer = _load(_metadata(reference, pre=pre, add_bos_token=False))
    for text in [*CORPUS[:1], *_texts()]:
        expected = reference.encode(text).ids
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", sorted(_PRE))
def test_every_splitting_rule_keeps_the_text(pre: str) -> None:
    tokenizer = _load(_metadata(_reference(["gpt2"]), pre=pre))
    for text in _texts(60):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_every_rule_has_a_name() -> None:
    assert set(_PRE.values()) == set(_SPLITS)


@given(text=st.text(max_size=80))
def test_any_text_comes_back(text: str) -> None:
    assert SMOLLM.decode(SMOLLM.encode(text), skip_special_tokens=False) == text


SMOLLM = _load(_metadata(_reference(PUBLISHED["smollm"])))


def test_digits_are_split_one_by_one() -> None:
    assert len(SMOLLM.encode("12345")) == 5
    llama3 = _load(_metadata(_reference(["gpt2"]), pre="llama-bpe"))
    assert [word for word, _ in llama3._backend.pre_tokenizer.pre_tokenize_str("12345")] == ["123", "45"]


def test_special_tokens_are_one_id_and_have_no_text() -> None:
    ids = SMOLLM.encode("<|im_start|>user\n")
    assert ids[0] == 1
    assert SMOLLM.decode(ids) == "user\n"
    assert SMOLLM.decode(ids, skip_special_tokens=False) == "<|im_start|>user\n"
    assert SMOLLM.decode([1, SMOLLM.vocab_size, 2**32 - 1]) == ""


def test_begin_and_end_tokens() -> None:
    reference = _reference(["gpt2"])
    plain = reference.encode("the").ids
    for changes, expected in [
        ({}, plain),
        ({"add_bos_token": True}, [1, *plain]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, *plain, 2]),
        ({"pre": "llama-bpe"}, [1, *plain]),
        ({"pre": "llama-bpe", "add_bos_token": False}, plain),
        ({"add_bos_token": True, "bos_token_id": 10**6}, plain),
    ]:
        tokenizer = _load(_metadata(reference, **changes))
        assert tokenizer.encode("the") == expected, changes
        assert tokenizer.encode("the", add_special_tokens=False) == plain


def test_every_end_of_generation_id() -> None:
    reference = _reference(["gpt2"])
    assert _load(_metadata(reference)).eos_ids == {0, 2}  # <|endoftext|> ends an answer wherever it is a control token
    assert _load(_metadata(reference, eot_token_id=7, eom_token_id=8)).eos_ids == {0, 2, 7, 8}
    types = [1] * reference.get_vocab_size()
    assert _load(_metadata(reference, token_type=types, eos_token_id=5)).eos_ids == {5}


def test_an_unknown_rule_is_said_and_the_default_used(caplog: pytest.LogCaptureFixture) -> None:
    reference = _reference(["gpt2"])
    tokenizer = _load(_metadata(reference, pre="brand-new"))
    assert "brand-new" in caplog.text
    assert tokenizer.encode("a+b 12345") == _load(_metadata(reference, pre="default")).encode("a+b 12345")


def _sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    words = [*"▁Helowrd1", "He", "ll", "Hell", "Hello", "▁Hello", "▁w", "or", "▁wor", "ld", "▁world"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words, "<tool>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words), 4]
    scores = [0.0] * 259 + [-1000.0] * 9 + [-float(i) for i in range(len(words) - 9)] + [0.0]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{key if "." in key else f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def _pieces(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer._backend.id_to_token(i) for i in tokenizer.encode(text)]


def test_sentencepiece() -> None:
    tokenizer = _load(_sentencepiece_metadata())
    assert _pieces(tokenizer, "Hello world") == ["<s>", "▁Hello", "▁world"]
    assert _pieces(tokenizer, " Hello") == ["<s>", "▁", "▁Hello"]
    assert _pieces(tokenizer, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert _pieces(tokenizer, "<tool>Hello</s>") == ["<s>", "<tool>", "▁Hello", "</s>"]
    for text in ["Hello world", "  Hello\n", "你好 👍🏽", "", " "]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {2}


def test_sentencepiece_without_prefix_keeps_leading_spaces() -> None:
    metadata = _sentencepiece_metadata(add_space_prefix=False, **{"general.architecture": "gemma2"})
    one = metadata["tokenizer.ggml.tokens"].index("1")  # Gemma's runs of spaces, in real spaces, come before all merges
    metadata["tokenizer.ggml.tokens"][one], metadata["tokenizer.ggml.token_type"][one] = "  ", 4
    tokenizer = _load(metadata)
    assert _pieces(tokenizer, "Hello  world") == ["<s>", "Hello", "▁▁", "w", "or", "ld"]
    for text in [" Hello", "Hello", "   ", "a  b"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_ids_are_those_of_transformers_conversion() -> None:
    """Merges ranked by score, prefix and byte fallback against the library's own parts put together by hand."""
    metadata = _sentencepiece_metadata()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    splits = [(t[:k], t[k:]) for t in tokens[259:-1] for k in range(1, len(t)) if t[:k] in ids and t[k:] in ids]
    merges = sorted(splits, key=lambda m: (scores[ids[m[0] + m[1]]], len(m[0]), len(m[1])), reverse=True)
    reference = Backend(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reference.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer, rng = _load(metadata), random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice(["Hell", "o", "w", "or", "ld", "1", "é", "world", " Hello", " w"]) for _ in range(8))
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text).ids, text


def test_phi3_role_tokens_swallow_the_white_space_after_them() -> None:
    tokens = [*_sentencepiece_metadata()["tokenizer.ggml.tokens"], "<|user|>"]
    changes = {"tokens": tokens, "token_type": [*_sentencepiece_metadata()["tokenizer.ggml.token_type"], 3]}
    changes |= {"scores": [*_sentencepiece_metadata()["tokenizer.ggml.scores"], 0.0]}
    for architecture, expected in [("phi3", ["<|user|>", "▁Hello"]), ("llama", ["<|user|>", "▁", "<0x0A>", "Hello"])]:
        tokenizer = _load(_sentencepiece_metadata(**changes, **{"general.architecture": architecture}))
        assert _pieces(tokenizer, "<|user|>\nHello")[1:] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "bert"},
        {"model": 3},
        {"tokens": []},
        {"tokens": "abc"},
        {"tokens": [1, 2]},
        {"token_type": [1]},
        {"token_type": ["a"]},
        {"merges": ["ab"]},
        {"merges": ["a b c"]},
        {"merges": ["zzz qqq"]},
        {"merges": [None]},
    ],
)
def test_broken_metadata(changes: dict[str, Any]) -> None:
    with pytest.raises(WeightsError) as caught:
        Tokenizer.load("model.gguf", _metadata(_reference(["gpt2"]), **changes))
    assert caught.value.code in ("tokenizer.corrupt", "tokenizer.unsupported")
    assert str(caught.value).startswith("model.gguf: ")
    assert caught.value.remedy


@given(data=st.data())
def test_mutated_metadata_ends_in_a_tokenizer_or_a_coded_error(data: st.DataObject) -> None:
    metadata = _sentencepiece_metadata() if data.draw(st.booleans()) else dict(BASE)
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=4)):
        metadata[key] = data.draw(st.one_of(scalars, st.lists(scalars, max_size=4)))
    try:
        tokenizer = Tokenizer.load("model.gguf", metadata)
        assert tokenizer is None or isinstance(tokenizer.encode("Hello 12"), list)
    except LabinferError:
        pass


BASE = _metadata(_reference(["gpt2"]))


def test_no_tokenizer() -> None:
    assert Tokenizer.load("model.gguf", {}) is None
    assert Tokenizer.load("model.gguf", {"tokenizer.ggml.model": "none"}) is None


@pytest.mark.parametrize("text", [None, 3, b"x", "\ud800", ["a"]])
def test_what_is_no_text(text: Any) -> None:
    with pytest.raises(UsageError) as caught:
        SMOLLM.encode(text)
    assert caught.value.code == "tokenizer.text"


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def test_chats_are_encoded_as_the_template_writes_them() -> None:
    tokenizer = _load(_metadata(_reference(["gpt2"]), chat_template=TEMPLATE, add_bos_token=True))
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template(messages) == "<|im_start|>user: the<|im_end|>"
    ids = tokenizer.encode_chat(messages)
    assert ids.count(1) == 1
    assert (ids[0], ids[-1]) == (1, 2)
    with pytest.raises(UsageError) as caught:
        SMOLLM.apply_chat_template(messages)
    assert caught.value.code == "chat.no-template"


def test_tools_take_the_template_for_tools() -> None:
    metadata = _metadata(_reference(["gpt2"]), chat_template="plain") | {"tokenizer.chat_template.tool_use": "tools"}
    tokenizer = _load(metadata)
    assert tokenizer.apply_chat_template([]) == "plain"
    assert tokenizer.apply_chat_template([], tools=[{"type": "function"}]) == "tools"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory as transformers saves one."""
    backend = _reference(PUBLISHED["smollm"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path, "tokenizer_config", bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    _write(tmp_path, "generation_config", eos_token_id=[0, 2])
    return tmp_path


def _write(folder: Path, name: str, **values: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(values))


def test_a_directory(model: Path) -> None:
    tokenizer = _load_directory(model)
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog")
    assert ids[0] == 1
    assert len(ids) > 4
    assert tokenizer.decode(ids) == "the quick brown fox jumps over the lazy dog"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (1, frozenset({0, 2}), None)


def _load_directory(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


def test_add_bos_token_in_the_config_decides(model: Path) -> None:
    _write(model, "tokenizer_config", bos_token="<|im_start|>", eos_token="<|im_end|>", add_bos_token=False)
    assert 1 not in _load_directory(model).encode("the")
    _write(model, "tokenizer_config", bos_token="<|im_start|>", eos_token="<|im_end|>", add_eos_token=True)
    assert _load_directory(model).encode("the")[-1] == 2


def test_special_tokens_from_the_other_files(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    (model / "generation_config.json").unlink()
    _write(model, "special_tokens_map", eos_token="<|im_end|>")
    _write(model, "config", bos_token_id=1, eos_token_id=0)
    tokenizer = _load_directory(model)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, frozenset({0, 2}))


def test_tokens_only_the_config_declares(model: Path) -> None:
    size = _load_directory(model).vocab_size
    declared = {str(size): {"content": "<new>", "special": True}, "9999": {"content": "<far>", "special": True}}
    _write(model, "tokenizer_config", added_tokens_decoder=declared)
    tokenizer = _load_directory(model)
    assert tokenizer.encode("<new>", add_special_tokens=False) == [size]
    assert tokenizer.decode([size]) == ""
    assert tokenizer.vocab_size == size + 1


def test_where_chat_templates_come_from(model: Path) -> None:
    _write(model, "chat_template", chat_template="processor")
    assert _load_directory(model).chat_template == "processor"
    _write(model, "tokenizer_config", chat_template="config")
    assert _load_directory(model).chat_template == "config"
    named = [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "with tools"}]
    _write(model, "tokenizer_config", chat_template=named)
    assert _load_directory(model).chat_template == "named"
    assert _load_directory(model).apply_chat_template([], tools=[{}]) == "with tools"
    (model / "chat_template.jinja").write_text("file")
    assert _load_directory(model).chat_template == "file"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": "1.0"}',
        "[" * 100_000,
        "\x00",
        '{"model": {"type": "BPE", "vocab": {"a": -1}}}',
    ],
)
def test_a_broken_tokenizer_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(WeightsError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.code == "tokenizer.corrupt"
    assert caught.value.place is not None


def test_a_broken_config(model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"a": ')
    with pytest.raises(WeightsError, match="not valid JSON"):
        Tokenizer.load(model)
    _write(model, "tokenizer_config", bos_token=3, eos_token=[], chat_template=7, added_tokens_decoder=["x"])
    _write(model, "generation_config", eos_token_id=["a", -1, True, 2.5])
    tokenizer = _load_directory(model)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (None, frozenset(), None)


def test_a_directory_without_tokenizer_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Tokenizer.load(tmp_path) is None
    assert not caplog.text
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert Tokenizer.load(tmp_path) is None
    assert "save_pretrained" in caplog.text


def test_gguf_and_directory_give_the_same_ids(model: Path) -> None:
    directory = _load_directory(model)
    for text in _texts(200):
        assert SMOLLM.encode(text) == directory.encode(text, add_special_tokens=False)


def test_user_defined_tokens_are_matched_whole_and_keep_their_text() -> None:
    reference = _reference(["gpt2"])
    metadata = _metadata(reference)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>", "    "]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4, 4]
    reference.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False)])
    tokenizer = _load(metadata)
    for text in ["<think>a    b</think>", "     x", "<think", "é    "]:
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_smollm2() -> None:
    """Ids of the real model as Hugging Face's tokenizer gives them."""
    from labinfer.runtime.weights.checkpoint import open_checkpoint

    path = catalogue.find("smollm2-135m").pulled()
    if path is None:
        pytest.skip("SmolLM2 is not in the cache: labinfer pull smollm2-135m")
    with open_checkpoint(path) as checkpoint:
        tokenizer = _load(checkpoint.config)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, frozenset({0, 2}))
    assert tokenizer.encode("12345") == [33, 34, 35, 36, 37]
    question = [1780, 314, 260, 3575, 282, 4649, 47]
    assert tokenizer.encode("What is the capital of France?") == question
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    chat = [*system, 2, 198, 1, 4093, 198, *question, 2, 198, 1, 520, 9531, 198]
    assert tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}]) == chat

"""Build a tokenizer from GGUF metadata: the vocabulary is in the file, the rules around it are named by it.

Two kinds exist: ``tokenizer.ggml.model`` "gpt2" is byte-level BPE whose splitting rule ``tokenizer.ggml.pre`` names
(the table below; llama.cpp's names, the publishers' expressions), "llama" is SentencePiece BPE with scores.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labinfer.errors import LabinferError, WeightsError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_log = logging.getLogger(__name__)

MAX_PIECE = 256  # characters of a SentencePiece piece that merges are derived for; real ones have at most 48

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_PADDING = re.compile(r"\[PAD\d+\]")  # converters fill the vocabulary up to the embedding's rows with these

_END_OF_GENERATION = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<|return|>", "<|call|>",
})  # fmt: skip

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (  # words split where lower case meets upper case
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED = (  # DeepSeek's list of letters that have case; escaped where an editor would normalise the character
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffcℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇ"
    "Ꞌ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_CJK = r"[一-龥ࠀ-一가-퟿]+"

# Expressions applied one after the other; what one matches and what lies between become separate words.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt2": (_GPT2,),
    "digits": (r"\p{N}", _GPT2),
    "llama3": (_CL100K % "{1,3}",),
    "qwen2": (_CL100K % "",),
    "tekken": (_O200K % ("", "", ""),),
    "gpt4o": (_O200K % (_CONTRACTION, _CONTRACTION, "{1,3}"),),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-llm": (r"[\r\n]", r"\s?" + _CASED, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
}  # fmt: skip

_PRE_NAMES = {
    "default": "default",
    "gpt2": "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum jina-es jina-de "
    "jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe",
    "digits": "smollm starcoder refact command-r codeshell exaone minerva-7b",
    "llama3": "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe",
    "qwen2": "qwen2 stablelm2 deepseek-r1-qwen kormo megrez hunyuan grok-2",
    "tekken": "tekken",
    "gpt4o": "gpt-4o llama4 minimax-m2",
    "falcon": "falcon",
    "deepseek-llm": "deepseek-llm",
    "deepseek-coder": "deepseek-coder",
    "deepseek-v3": "deepseek-v3 hunyuan-dense",
    "bloom": "bloom poro-chat gpt3-finnish",
}
_PRE = {name: rule for rule, names in _PRE_NAMES.items() for name in names.split()}

# A word that is a whole token is taken as it is, before any merge; these families' merge lists rely on it.
_IGNORES_MERGES = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
)


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer from GGUF metadata; ``token_text`` maps names such as ``bos_token`` to their strings."""

    backend: Backend
    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    token_text: dict[str, str]
    chat_templates: dict[str, str]


def gguf_tokenizer(metadata: Mapping[str, Any]) -> GgufTokenizer | None:
    """The tokenizer ``metadata`` describes, None when it has none; raises WeightsError when it is broken or unknown."""
    model = metadata.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return None
    builder = {"gpt2": _byte_level, "llama": _sentencepiece}.get(model) if isinstance(model, str) else None
    if builder is None:
        message = f"tokenizers of kind {str(model)[:40]!r} cannot be built from GGUF metadata"
        remedy = "use the model's safetensors version; its tokenizer.json is read as it is"
        raise WeightsError("tokenizer.unsupported", message, remedy=remedy)
    vocabulary = _Vocabulary.read(metadata)
    try:
        backend = builder(vocabulary, metadata)
        _add_special_tokens(backend, vocabulary, metadata)
        _add_ends(backend, vocabulary, metadata)
    except LabinferError:
        raise
    except Exception as problem:  # the tokenizers library raises bare Exception
        raise _broken(str(problem)[:200]) from None
    return GgufTokenizer(
        backend,
        len(vocabulary.tokens),
        vocabulary.special(metadata, "bos"),
        _end_of_generation(vocabulary, metadata),
        {
            f"{role}_token": vocabulary.tokens[token]
            for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (token := vocabulary.special(metadata, key)) is not None
        },
        _chat_templates(metadata),
    )


def _broken(message: str) -> WeightsError:
    remedy = "download or convert the file again"
    return WeightsError("tokenizer.corrupt", f"the GGUF metadata's tokenizer is broken: {message}", remedy=remedy)


@dataclass(frozen=True)
class _Vocabulary:
    """Checked vocabulary: strings and types by token id, ids by string (the first one's where strings repeat)."""

    tokens: Sequence[str]
    types: Sequence[int]
    ids: dict[str, int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> _Vocabulary:
        tokens = _array(metadata, "tokens", str)
        types = _array(metadata, "token_type", int) or [1] * len(tokens)
        if not tokens or len(types) != len(tokens):
            raise _broken(f"{len(tokens)} tokens and {len(types)} token types")
        ids: dict[str, int] = {}
        for token, (string, kind) in enumerate(zip(tokens, types, strict=True)):
            if string and not (kind == _UNUSED and _PADDING.fullmatch(string)):
                ids.setdefault(string, token)
        return cls(tokens, types, ids)

    def special(self, metadata: Mapping[str, Any], role: str) -> int | None:
        """The id under ``tokenizer.ggml.ROLE_token_id``; one outside the vocabulary is no id."""
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return token if isinstance(token, int) and 0 <= token < len(self.tokens) else None

    def of_type(self, *kinds: int) -> list[str]:
        return [string for string, token in self.ids.items() if self.types[token] in kinds]


def _array(metadata: Mapping[str, Any], name: str, kind: type) -> Sequence[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}", ())
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise _broken(f"{name} is no array")
    if not set(map(type, values)) <= {kind}:
        raise _broken(f"{name} holds a value that is not of type {kind.__name__}")
    return values


def _byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Backend:
    """Byte-level BPE: words by the splitting rule, then merges over the bytes' printable stand-ins."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in _array(metadata, "merges", str)]
    if not all(len(merge) == 2 for merge in merges):
        raise _broken("a merge is not two strings with a space between")
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE:
        _log.warning(
            "the GGUF file names the splitting rule %r, which is not known here: using the default one; text may be "
            "split otherwise than in training, and answers may be worse",
            pre,
        )
    splits = _SPLITS[_PRE.get(str(pre), "default")]
    backend = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre in _IGNORES_MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Backend:
    """SentencePiece BPE as Hugging Face converts it: merges from scores, unknown characters as byte tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _respell_spaces(vocabulary)
    unknown = vocabulary.special(metadata, "unknown")
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_from_scores(vocabulary, metadata),
            unk_token=vocabulary.tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", "▁")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    return backend


def _respell_spaces(vocabulary: _Vocabulary) -> _Vocabulary:
    """Gemma files write its tokens for runs of spaces with real spaces; text reaches the model with ▁ for each."""
    ids = {("▁" * len(string) if not string.strip(" ") else string): token for string, token in vocabulary.ids.items()}
    return _Vocabulary(vocabulary.tokens, vocabulary.types, ids)


def _merges_from_scores(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best piece first (as transformers' generate_merges).

    The best score merges first; Gemma's scores are not in merge order, its token ids are.
    """
    scores = [float(score) for score in _array(metadata, "scores", float)]
    if str(metadata.get("general.architecture", "")).startswith("gemma") or not scores:
        scores = [-float(token) for token in range(len(vocabulary.tokens))]
    if len(scores) != len(vocabulary.tokens):
        raise _broken(f"{len(vocabulary.tokens)} tokens and {len(scores)} scores")
    ids, types = vocabulary.ids, vocabulary.types
    pieces = {s: t for s, t in ids.items() if types[t] not in (_UNKNOWN, _CONTROL, _BYTE, _UNUSED)}
    by_score: dict[float, list[tuple[str, str]]] = {}  # scores hardly ever repeat, so nearly nothing is left to sort
    for piece, token in pieces.items():
        if len(piece) > MAX_PIECE:
            continue
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in pieces]
        splits = [split for split in splits if split[1] in pieces]
        splits.sort(key=lambda split: (pieces[split[0]], pieces[split[1]]))
        by_score.setdefault(scores[token], []).extend(splits)
    for splits in by_score.values():
        splits.sort(key=lambda split: (-len(split[0]), -len(split[1])))
    return [split for score in sorted(by_score, reverse=True) for split in by_score[score]]


def _add_special_tokens(backend: Backend, vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> None:
    """Control tokens are special; both they and user-defined tokens are matched whole before anything else."""
    from tokenizers import AddedToken

    # Phi-3's role tokens swallow the white space that follows; GGUF has no key for it.
    swallows = metadata.get("general.architecture") == "phi3" and metadata["tokenizer.ggml.model"] == "llama"
    keeps = {"<unk>", "<s>", "<|endoftext|>"}
    special = vocabulary.of_type(_UNKNOWN, _CONTROL)
    backend.add_special_tokens(
        [AddedToken(s, normalized=False, special=True, rstrip=swallows and s not in keeps) for s in special]
    )
    # Runs of spaces reach a SentencePiece model as runs of ▁ and are merged there.
    byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
    own = [s for s in vocabulary.of_type(_USER_DEFINED) if byte_level or s.strip(" ▁")]
    backend.add_tokens([AddedToken(s, normalized=False, special=False) for s in own])


def _add_ends(backend: Backend, vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> None:
    """Let ``encode`` add begin and end tokens as the file asks; llama.cpp's defaults where it is silent."""
    begins = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _IGNORES_MERGES
    bos, eos = vocabulary.special(metadata, "bos"), vocabulary.special(metadata, "eos")
    add_begin_and_end(
        backend,
        bos if metadata.get("tokenizer.ggml.add_bos_token", begins) else None,
        eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )


def add_begin_and_end(backend: Backend, bos: int | None, eos: int | None) -> None:
    """Make ``backend`` put ``bos`` before and ``eos`` after every text it encodes; None for neither."""
    from tokenizers.processors import TemplateProcessing

    ends = [(role, token) for role, token in (("bos", bos), ("eos", eos)) if token is not None]
    backend.post_processor = TemplateProcessing(
        single=["bos"] * (bos is not None) + ["$A"] + ["eos"] * (eos is not None),
        special_tokens=ends,
    )


def _end_of_generation(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> frozenset[int]:
    """eos, eot and eom, and the control tokens known by name to end an answer, as llama.cpp finds them."""
    named = {vocabulary.ids[s] for s in vocabulary.of_type(_CONTROL, _USER_DEFINED) if s in _END_OF_GENERATION}
    if {"<|return|>", "<|call|>"} <= vocabulary.ids.keys():  # gpt-oss ends its inner messages with <|end|>
        named.discard(vocabulary.ids.get("<|end|>", -1))
    keyed = {vocabulary.special(metadata, role) for role in ("eos", "eot", "eom")}
    return frozenset(named | {token for token in keyed if token is not None})


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; the plain one is called "default"."""
    prefix = "tokenizer.chat_template"
    found = {"default" if k == prefix else k[len(prefix) + 1 :]: v for k, v in metadata.items() if k.startswith(prefix)}
    return {name: source for name, source in found.items() if isinstance(source, str)}

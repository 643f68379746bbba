"""Text to token ids and back, and messages to prompts, by the files that came with the model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labinfer.errors import Place, UsageError, WeightsError
from labinfer.runtime.chat_template import render_chat_template
from labinfer.runtime.detokenizer import StreamDecoder, check_token_id, stream_decoder, token_bytes
from labinfer.runtime.gguf_tokenizer import add_begin_and_end, gguf_tokenizer
from labinfer.runtime.weights.json_text import read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_log = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 256 << 20  # the largest in use has 35 MB
MAX_TEMPLATE_BYTES = 1 << 20
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer, over the ``tokenizers`` library.

    ``vocab_size`` counts all tokens, added ones too; ``bos_id`` begins a text (None: the model has no such token);
    ``eos_ids`` are all ids that end a generation, ``special_ids`` those that are no part of a text;
    ``chat_template`` is the Jinja source for chats, or None.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_ids: Iterable[int],
        token_text: Mapping[str, str],
        chat_templates: Mapping[str, str],
    ) -> None:
        self._backend = backend
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self._token_text = dict(token_text)
        self._chat_templates = dict(chat_templates)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def load(cls, path: Path | str, gguf_metadata: Mapping[str, Any] | None = None) -> Tokenizer | None:
        """The tokenizer of a model directory (tokenizer.json and the files beside it) or of GGUF metadata.

        None when there is none. Raises WeightsError when it is broken or of a kind that cannot be read.
        """
        if gguf_metadata is None:
            return _load_directory(Path(path))
        try:
            parts = gguf_tokenizer(gguf_metadata)
        except WeightsError as problem:
            problem.place = problem.place or Place(str(path))
            raise
        return None if parts is None else cls(**vars(parts))

    @property
    def chat_template(self) -> str | None:
        """The Jinja source for chats without tools, None when the model has none."""
        return self._chat_templates.get("default")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written in it are recognised, as by transformers and vLLM.

        ``add_special_tokens`` adds what the model puts around a text (usually BOS). Raises UsageError for what is no
        text.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            what = "text with half of a surrogate pair" if isinstance(text, str) else type(text).__name__
            raise UsageError("tokenizer.text", f"only valid Unicode text can be encoded, not {what}") from None
        except Exception as problem:  # the library raises bare Exception, e.g. for a character without a token
            raise WeightsError("tokenizer.encode", f"the tokenizer cannot encode this text: {problem}") from None

    @cached_property
    def special_text(self) -> re.Pattern[str]:
        """Finds the special tokens that are written in a text."""
        texts = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")

    @cached_property
    def _literal(self) -> Backend:
        """The same tokenizer, to which special tokens in a text are text."""
        backend = type(self._backend).from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of ``text``, in which no special token is recognised."""
        return list(self._literal.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids outside the vocabulary have none, as in transformers. UsageError for what is no id."""
        return self._backend.decode(list(map(check_token_id, ids)), skip_special_tokens=skip_special_tokens)

    def stream(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Decode tokens that follow ``prompt_ids`` one at a time.

        Without a prompt the parts join to ``decode``'s text; with one, to what ``decode`` gives beyond the prompt's.
        """
        return stream_decoder(self._backend, prompt_ids, self.special_ids if skip_special_tokens else frozenset())

    def token_bytes(self, count: int) -> list[bytes]:
        """What each of the first ``count`` tokens adds to a text, UTF-8; ids that no token has add nothing."""
        return token_bytes(self._backend, range(count))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text for ``messages`` by the model's chat template; ``variables`` go to the template.

        Raises UsageError without a template or when it refuses the messages, WeightsError when the template is broken.
        """
        source = self._chat_templates.get("tool_use", self.chat_template) if tools else self.chat_template
        if source is None:
            remedy = "give it plain text, or use an instruction-tuned version of the model"
            raise UsageError("chat.no-template", "this model has no chat template", remedy=remedy)
        variables = {**self._token_text, **variables}
        return render_chat_template(
            source, messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of the prompt for ``messages``; nothing is added, the template writes BOS itself."""
        return self.encode(self.apply_chat_template(messages, **options), add_special_tokens=False)


def _load_directory(directory: Path) -> Tokenizer | None:
    file = directory / "tokenizer.json"
    if not file.is_file():
        other = next((name for name in ("tokenizer.model", "vocab.json") if (directory / name).is_file()), None)
        if other:
            _log.warning(
                "%s has %s but no tokenizer.json, so it is used without a tokenizer; transformers writes one: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
                directory,
                other,
            )
        return None
    config = {name: _optional_json(directory / f"{name}.json") for name in _CONFIG_FILES}
    backend = _read_backend(file)
    names = {**config["special_tokens_map"], **config["tokenizer_config"]}
    token_text = {role: text for role in _ROLES if (text := _token_string(names.get(role))) is not None}
    _add_missing_tokens(backend, config["tokenizer_config"])
    generation = config["generation_config"] or config["config"]
    bos_id, eos_id = (backend.token_to_id(token_text.get(role, "")) for role in ("bos_token", "eos_token"))
    if bos_id is None and (ids := _ids(generation.get("bos_token_id"))):
        bos_id = ids[0]
    flags = [config["tokenizer_config"].get(key) for key in ("add_bos_token", "add_eos_token")]
    if flags != [None, None]:
        add_begin_and_end(backend, bos_id if flags[0] else None, eos_id if flags[1] else None)
    return Tokenizer(
        backend,
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        bos_id=bos_id,
        eos_ids=[*_ids(eos_id), *_ids(generation.get("eos_token_id"))],
        token_text=token_text,
        chat_templates=_chat_templates(directory, config["tokenizer_config"]),
    )


_CONFIG_FILES = ("tokenizer_config", "special_tokens_map", "generation_config", "config")


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json_object(file, WeightsError) if file.is_file() else {}


def _read_backend(file: Path) -> Backend:
    """Read tokenizer.json; truncation and padding are training settings and are switched off, as transformers does."""
    from tokenizers import Tokenizer as Backend

    place, remedy = Place(str(file)), "download the file again"
    if (size := file.stat().st_size) > MAX_TOKENIZER_BYTES:
        raise WeightsError("tokenizer.too-large", f"{size} bytes are too many for a tokenizer", place=place)
    try:
        backend = Backend.from_buffer(file.read_bytes())
        backend.no_truncation()
        backend.no_padding()
        return backend
    except (KeyboardInterrupt, SystemExit):
        raise
    except OSError as problem:
        raise WeightsError("tokenizer.unreadable", str(problem.strerror), place=place) from None
    except BaseException as problem:  # the library raises bare Exception, and PanicException beside it
        raise WeightsError("tokenizer.corrupt", str(problem)[:200], place=place, remedy=remedy) from None


def _token_string(value: object) -> str | None:
    """A token in tokenizer_config.json is a string or an object with its ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and token >= 0]


def _add_missing_tokens(backend: Backend, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json declares, wherever they get the id it gives them."""
    from tokenizers import AddedToken

    declared = config.get("added_tokens_decoder")
    known = backend.get_added_tokens_decoder()
    for key, spec in declared.items() if isinstance(declared, dict) else ():
        text = _token_string(spec)
        if not text or not isinstance(spec, dict) or not key.isdecimal() or int(key) in known:
            continue
        present = backend.token_to_id(text)
        if int(key) == (backend.get_vocab_size(with_added_tokens=True) if present is None else present):
            flags = {f: bool(spec.get(f)) for f in ("special", "normalized", "lstrip", "rstrip", "single_word")}
            backend.add_tokens([AddedToken(text, **flags)])


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name ("default", "tool_use", ...); a file of its own goes before tokenizer_config.json."""
    declared = config.get("chat_template")
    named = (
        {e.get("name"): e.get("template") for e in declared if isinstance(e, dict)} if type(declared) is list else {}
    )
    named = named or {"default": declared or _optional_json(directory / "chat_template.json").get("chat_template")}
    files = {"default": directory / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            named[name] = _read_template(file)
    return {str(name): source for name, source in named.items() if isinstance(source, str)}


def _read_template(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(MAX_TEMPLATE_BYTES + 1)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise WeightsError("chat-template.too-large", "a chat template is larger than 1 MiB", place=Place(str(file)))
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise WeightsError("chat-template.failed", "a chat template is not UTF-8", place=Place(str(file))) from None

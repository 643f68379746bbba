"""Settings for all tests, a LABINFER_HOME of their own for those that ask, and a look at every cache after each."""

import contextlib
import io
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from labinfer.runtime.model import Model

if TYPE_CHECKING:
    import openai

    from .service import Served

# What a test does not say runs on the reference device, whatever is installed; tests/cpu says `cpu`.
os.environ["LABINFER_DEVICES"] = "reference"

# Reports are as wide as the terminal; pytest-xdist tells its workers of one that they do not write to.
os.environ.pop("COLUMNS", None)

# Started in the background, a shell's child ignores Ctrl-C, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The machines that run this are slow and shared: what is checked is the result, never the time of one example.
settings.register_profile("labinfer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("labinfer")


_models: weakref.WeakSet[Model] = weakref.WeakSet()
_init = Model.__init__


def _remembered(self: Model, *arguments: Any, **options: Any) -> None:
    """``Model.__init__``; the model is looked at after this test and later ones."""
    _init(self, *arguments, **options)
    _models.add(self)


Model.__init__ = _remembered  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def books_are_right() -> Iterator[None]:
    """After every test, the books of every model's cache are right, whatever became of its requests."""
    yield
    for model in list(_models):
        with model.lock:
            model.blocks.check_integrity()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LABINFER_HOME, for this process and the ones it starts."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("LABINFER_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 2 layers with a tokenizer of 64 words and a chat template."""
    import json

    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    size, heads, width, vocab, layers = 16, 4, 32, 64, 2
    config = {
        "model_type": "llama", "hidden_size": size, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 2, "intermediate_size": width, "vocab_size": vocab, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
        "torch_dtype": "float32", "eos_token_id": 1,
    }  # fmt: skip
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, size), "model.norm.weight": (size,)}
    for layer in range(layers):
        inner = {
            "input_layernorm": (size,), "post_attention_layernorm": (size,), "self_attn.q_proj": (size, size),
            "self_attn.k_proj": (size // 2, size), "self_attn.v_proj": (size // 2, size),
            "self_attn.o_proj": (size, size), "mlp.gate_proj": (width, size), "mlp.up_proj": (width, size),
            "mlp.down_proj": (size, width),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inner.items()}
    tensors = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<unk>": 0, "<eos>": 1, "user": 2, "assistant": 3, "system": 4, **{f"w{n}": n for n in range(5, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": template}))
    return folder


@pytest.fixture(scope="session")
def byte_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a token for each byte, so that it can write JSON."""
    import json

    import numpy as np
    from safetensors.numpy import load_file, save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bytes")
    config = json.loads((tiny_model / "config.json").read_text())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<unk>": 0, "<eos>": 1, **{letter: 2 + n for n, letter in enumerate(alphabet)}}
    config |= {"vocab_size": len(words), "max_position_embeddings": 2048}
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = np.random.default_rng(1).normal(0, 0.5, (len(words), 16)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text((tiny_model / "tokenizer_config.json").read_text())
    return folder


@pytest.fixture(scope="module")
def client(api: "Served") -> "Iterator[openai.OpenAI]":
    """OpenAI's client of the service that the module's fixture ``api`` is."""
    import openai

    from .service import KEY

    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def labinfer_cli(tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """Runs a command line in this process, in ``tmp_path`` as the current folder and without a terminal."""
    from labinfer.cli.main import main

    def run(*arguments: object, stdin: str = "") -> CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        out, err, source = io.StringIO(), io.StringIO(), io.TextIOWrapper(io.BytesIO(stdin.encode()))
        handler = signal.getsignal(signal.SIGTERM)
        with (
            contextlib.chdir(tmp_path), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):  # fmt: skip
            patch.setattr("sys.stdin", source)
            exit_code = main(words)
        signal.signal(signal.SIGTERM, handler)
        return CompletedProcess(words, exit_code, out.getvalue(), err.getvalue())

    return run

"""``labinfer compile``: what it writes, what it says, how quick it is, and how it fails."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from labinfer.compiler.plan import load_plan
from labinfer.errors import UsageError
from labinfer.files import atomic_write
from labinfer.units import human_count, parse_bytes, parse_count

Cli = Callable[..., subprocess.CompletedProcess[str]]
LLAMA_405B = {
    "model_type": "llama", "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128,
    "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip


def labinfer(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labinfer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, stdin=subprocess.DEVNULL)


def test_default_output_is_a_plan_and_stdout_stays_empty(tmp_path: Path):
    result = labinfer("compile", "llama.yaml", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "")
    assert "1,235,814,400 parameters" in result.stderr
    assert "wrote plan.json" in result.stderr
    assert os.listdir(tmp_path) == ["plan.json"]
    assert load_plan(tmp_path / "plan.json").source.name == "meta-llama/Llama-3.2-1B"


def test_bare_family_name_and_map_name_give_the_same_bytes(labinfer_cli: Cli, tmp_path: Path):
    one = labinfer_cli("compile", "llama", "-o", "-")
    other = labinfer_cli("compile", "llama.yaml", "-o", "-", "--trace")
    assert one.returncode == other.returncode == 0
    assert one.stdout == other.stdout
    assert json.loads(one.stdout)["schema_version"] == 1
    assert "verify lower" in other.stderr
    assert "lower" not in one.stderr.split("arena")[0]


def test_options_reach_the_plan(labinfer_cli: Cli, tmp_path: Path):
    result = labinfer_cli(
        "compile", "llama", "-o", "p.json", "--max-model-len", "8k", "--max-num-seqs", 2, "--block-size", 32,
        "--max-num-batched-tokens", 64, "--max-logits-rows", 3, "--devices", "reference:0=0-3,reference:1=4-15",
        "--fuse", "none", "-q",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    plan = load_plan(tmp_path / "p.json")
    limits = plan.limits.model_dump()
    assert limits["max_model_len"] == 8192
    assert limits["groups"] == [{"window": None, "num_blocks": 2 * 8192 // 32, "swap_blocks": 0}]
    assert (limits["max_num_batched_tokens"], limits["max_logits_rows"]) == (64, 3)
    assert [stage.device for stage in plan.stages] == ["reference:0", "reference:1"]


def test_dry_run_writes_nothing_and_json_says_all(labinfer_cli: Cli, tmp_path: Path):
    result = labinfer_cli("compile", "llama", "--dry-run", "--json", "--trace")
    found = json.loads(result.stdout)
    assert result.returncode == 0
    assert found["plan"] is None
    assert found["stages"][0]["bytes"]["arena"] == found["stages"][0]["arena"]["size"]
    assert [step["name"] for step in found["trace"]][:2] == ["lower", "verify lower"]
    assert os.listdir(tmp_path) == []


def test_model_directory_is_remembered_in_the_plan(labinfer_cli: Cli, tmp_path: Path, tiny_model: Path):
    assert labinfer_cli("compile", tiny_model).returncode == 0
    assert load_plan(tmp_path / "plan.json").source.checkpoint == str(tiny_model)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["nothing-of-that-name"], 2, "model.unknown"),
        (["lama.yaml"], 3, "did you mean"),
        (["llama", "--max-model-len", "many"], 2, "4k"),
        (["llama", "--max-model-len", "256k"], 2, "limits.max-model-len"),
        (["llama", "--devices", "quantum"], 4, "device.unknown"),
        (["llama", "--devices", "reference:0=0-3"], 2, "layer 4"),
        (["llama", "--weights", "missing"], 5, "weights.missing-file"),
        (["llama", "--json", "-o", "-"], 2, "stdout"),
        (["bad.yaml"], 3, "bad.yaml:2:1: error[yaml.duplicate-key]"),
        (["llama", "-o", "no/such/folder/plan.json"], 1, "no/such/folder/plan.json"),
    ],
)
def test_failures_have_their_exit_code_and_leave_nothing(
    labinfer_cli: Cli, tmp_path: Path, arguments: list[str], exit_code: int, said: str
):
    (tmp_path / "bad.yaml").write_text("labmap: 1\nlabmap: 1\nfamily: [\n")
    result = labinfer_cli("compile", *arguments)
    output = result.stdout + result.stderr
    assert result.returncode == exit_code, output
    assert said in output
    assert "Traceback" not in output
    assert os.listdir(tmp_path) == ["bad.yaml"]


def test_an_old_plan_survives_a_failed_compile(labinfer_cli: Cli, tmp_path: Path):
    (tmp_path / "plan.json").write_text("old")
    assert labinfer_cli("compile", "llama", "--devices", "quantum").returncode == 4
    assert (tmp_path / "plan.json").read_text() == "old"


@pytest.mark.parametrize(
    "where", ["labinfer.api.read_model", "labinfer.compiler.compile.plan_arena", "labinfer.files.os.fsync"]
)
def test_an_interrupted_compile_leaves_nothing(tmp_path: Path, where: str):
    """The signal comes while the model is read, while it is compiled, and while the plan is written."""
    module, _, name = where.rpartition(".")
    code = "import os, pkgutil, signal, sys; from labinfer.cli.main import main\n"
    code += f"setattr(pkgutil.resolve_name('{module}'), '{name}', lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
    code += "sys.exit(main(['compile', 'llama']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert os.listdir(tmp_path) == []


def test_atomic_write_keeps_the_old_file_and_no_partial_one(tmp_path: Path):
    file = tmp_path / "f"
    file.write_text("old")

    def interrupted():
        with atomic_write(file) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["f"])
    link = tmp_path / "link"
    link.symlink_to(file)
    with atomic_write(link) as stream:
        stream.write(b"new")
    assert link.is_symlink()
    assert file.read_text() == "new"


@pytest.mark.alone
def test_compile_is_quick_and_small_even_for_405_billion_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bars of the project are 1.0 s and 150 MB for the whole process; CPU seconds hold on a busy machine too.

    Modules are compiled by the first run, as at a user's, whatever the environment of the tests says of that.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "modules"))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_405B))
    seconds = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert labinfer("compile", tmp_path, "-o", "p.json", cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 1.0
    code = "import sys; from labinfer.api import compile; compile(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    heavy = {"numpy", "networkx", "tokenizers", "safetensors", "rich"} & set(done.stdout.split())
    assert not heavy


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("8k", 8192), ("32K", 32768), ("1M", 1 << 20), ("0.5k", 512)]
)
def test_counts(text: str, number: int):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "k", "1.5", "8kk", "1e9", "9" * 400])
def test_bad_counts(text: str):
    with pytest.raises(UsageError):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1000", 1000),
        ("500MB", 500_000_000),
        ("2GiB", 2 << 30),
        ("1.5 kib", 1536),
        ("3g", 3 * 10**9),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, number: int):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "1.5.2", "8kk", "2iB", "1e9", "0.1", "9" * 400])
def test_bad_sizes(text: str):
    with pytest.raises(UsageError):
        parse_bytes(text)


def test_the_cache_can_be_given_in_bytes(labinfer_cli: Cli, tmp_path: Path):
    sizes = ("--kv-memory", "3MB", "--swap-space", "0.5")
    assert labinfer_cli("compile", "gemma2", "-o", "p.json", "--max-model-len", "8k", *sizes).returncode == 4
    sizes = ("--kv-memory", "3GB", "--swap-space", "0.5")
    assert labinfer_cli("compile", "gemma2", "-o", "p.json", "--max-model-len", "8k", *sizes).returncode == 0
    [stage] = load_plan(tmp_path / "p.json").stages
    assert 2.99e9 < stage.bytes.kv_cache <= 3e9
    assert (1 << 29) - 10**7 < stage.bytes.swap <= 1 << 29
    shown = labinfer_cli("explain", "p.json").stdout
    assert "layers that see the last 4,096 tokens" in shown
    assert "layers that see all tokens" in shown
    assert "of host memory for blocks that are swapped out" in shown
    wrong = labinfer_cli("compile", "gemma2", "--kv-memory", "much")
    assert (wrong.returncode, "--kv-memory" in wrong.stderr) == (2, True)


def test_human_count():
    assert human_count(537_000_000) + "flop" == "537 Mflop"

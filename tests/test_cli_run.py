"""``labinfer run``: prompts from everywhere, chats, taps, figures, and how it fails."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import labinfer
from labinfer.api import names_model
from labinfer.errors import UsageError
from labinfer.runtime.outputs import RequestOutput

PROMPT = "w10 w11 w12"
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def answer(tiny_model: Path) -> RequestOutput:
    """What the tiny model says to PROMPT, in 8 greedy tokens."""
    with labinfer.load(tiny_model) as model:
        ids = model.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
        return model.generate(ids, labinfer.SamplingParams(temperature=0, max_tokens=8))[0]


def test_prompt_by_argument_option_and_stdin_give_the_same_answer(labinfer_cli: Cli, tiny_model: Path, answer):
    ways = [
        labinfer_cli("run", tiny_model, PROMPT, "--max-new-tokens", 8),
        labinfer_cli("run", tiny_model, "--prompt", PROMPT, "--max-new-tokens", 8),
        labinfer_cli("run", tiny_model, "--max-new-tokens", 8, stdin=PROMPT + "\n"),
    ]
    for result in ways:
        assert (result.returncode, result.stdout, result.stderr) == (0, answer.text + "\n", "")


def test_plan_runs_and_json_holds_everything(labinfer_cli: Cli, tmp_path: Path, tiny_model: Path, answer):
    assert labinfer_cli("compile", tiny_model, "-o", "p.json").returncode == 0
    result = labinfer_cli("run", "p.json", PROMPT, "--max-new-tokens", 8, "--json")
    found = json.loads(result.stdout)
    assert (found["text"], found["token_ids"]) == (answer.text, answer.token_ids)
    assert found["prompt_token_ids"] == answer.prompt_token_ids
    assert found["finish_reason"] == answer.finish_reason
    assert found["stats"]["new_tokens"] == len(answer.token_ids)
    assert found["stats"]["peak_rss_bytes"] > 10_000_000


def test_raw_and_system_change_the_prompt(labinfer_cli: Cli, tiny_model: Path):
    raw = json.loads(labinfer_cli("run", tiny_model, PROMPT, "--raw", "--max-new-tokens", 1, "--json").stdout)
    assert raw["prompt_token_ids"] == [10, 11, 12]
    told = labinfer_cli("run", tiny_model, PROMPT, "--system", "w9", "--max-new-tokens", 1, "--json")
    assert json.loads(told.stdout)["prompt_token_ids"] == [4, 9, 2, 10, 11, 12, 3]
    both = labinfer_cli("run", tiny_model, PROMPT, "--system", "w9", "--raw")
    assert both.returncode == 2
    assert "chat.no-template" in both.stderr


def test_sampling_repeats_with_a_seed(labinfer_cli: Cli, tiny_model: Path):
    sampled = [
        labinfer_cli("run", tiny_model, PROMPT, "--temperature", 1.5, "--seed", seed, "--max-new-tokens", 12).stdout
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_form_and_end_of_an_answer_can_be_asked_for(labinfer_cli: Cli, tmp_path: Path, tiny_model: Path, answer):
    stop = answer.text.split()[3]
    cut = labinfer_cli("run", tiny_model, PROMPT, "--max-new-tokens", 8, "--stop", "never", "--stop", stop)
    assert cut.stdout == answer.text[: answer.text.index(stop)] + "\n"
    (tmp_path / "schema.json").write_text('{"type": "strin"}')
    refused = labinfer_cli("run", tiny_model, PROMPT, "--json-schema", "schema.json")
    assert (refused.returncode, "sampling.grammar" in refused.stderr) == (2, True)
    formed = labinfer_cli("run", tiny_model, PROMPT, "--regex", "( w2[0-9]){3}", "--temperature", 2, "--min-p", 0.01)
    assert re.fullmatch("( w2[0-9]){3}\n", formed.stdout), formed


def test_ignore_eos_goes_on(labinfer_cli: Cli, tiny_model: Path):
    found = json.loads(
        labinfer_cli(
            "run", tiny_model, PROMPT, "--ignore-eos", "--max-new-tokens", "60", "--temperature", 3, "--json"
        ).stdout
    )
    assert len(found["token_ids"]) == 60
    assert found["finish_reason"] == "length"


def test_stats_go_to_stderr(labinfer_cli: Cli, tiny_model: Path):
    result = labinfer_cli("run", tiny_model, PROMPT, "--max-new-tokens", 4, "--stats")
    assert "tokens/s" in result.stderr
    assert "peak memory" in result.stderr
    assert "tokens/s" not in result.stdout


def test_speculation_gives_the_same_answer_and_its_figures(labinfer_cli: Cli, tiny_model: Path, answer, monkeypatch):
    monkeypatch.setenv("LABINFER_SPECULATION", "1")
    for options in (["--speculative-tokens", 3, "--draft", tiny_model], ["--draft", tiny_model]):
        result = labinfer_cli("run", tiny_model, PROMPT, "--max-new-tokens", 8, *options, "--json")
        found = json.loads(result.stdout)
        assert (found["text"], found["token_ids"]) == (answer.text, answer.token_ids)
        assert found["stats"]["accepted_tokens"] == found["stats"]["proposed_tokens"] > 0
        assert found["stats"]["mean_accepted_length"] > 2
    told = labinfer_cli("run", tiny_model, PROMPT, "--max-new-tokens", 8, "--stats", "--draft", tiny_model)
    assert re.search(r"guessed (\d+) tokens, \1 right", told.stderr)
    told = labinfer_cli("run", tiny_model, PROMPT, "--max-new-tokens", 8, "--stats", "--speculative-tokens", 2)
    assert re.search(r"guessed \d+ tokens, \d+ right", told.stderr)
    assert "guessed" not in labinfer_cli("run", tiny_model, PROMPT, "--max-new-tokens", 8, "--stats").stderr
    assert labinfer_cli("compile", tiny_model, "-o", "p.json", "--max-logits-rows", 1).returncode == 0
    refused = labinfer_cli("run", "p.json", PROMPT, "--speculative-tokens", 2)
    assert refused.returncode == 2
    assert "--max-logits-rows 3" in refused.stderr


def test_model_without_tokenizer_takes_and_prints_ids(labinfer_cli: Cli, tmp_path: Path, tiny_model: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_model / name)
    result = labinfer_cli("run", tmp_path, "--token-ids", "5, 6 7", "--max-new-tokens", 3)
    assert result.returncode == 0
    assert len(result.stdout.strip().split(",")) == 3
    refused = labinfer_cli("run", tmp_path, PROMPT)
    assert refused.returncode == 2
    assert "--token-ids" in refused.stderr


def test_taps_hold_every_computed_token(labinfer_cli: Cli, tmp_path: Path, tiny_model: Path):
    result = labinfer_cli(
        "run", tiny_model, "--token-ids", "5,6,7", "--max-new-tokens", 4, "--ignore-eos", "--json",
        "--tap", "layers.1.attn.out=out.npy", "--tap", "logits=logits.npy",
    )  # fmt: skip
    made = json.loads(result.stdout)["token_ids"]
    out, logits = np.load(tmp_path / "out.npy"), np.load(tmp_path / "logits.npy")
    assert (out.shape, out.dtype) == ((3 + 3, 16), np.float32)  # the last token is never computed
    assert logits.argmax(axis=1).tolist() == made
    with labinfer.load(tiny_model) as model:
        expected = model.logits([5, 6, 7, *made[:-1]])
    np.testing.assert_allclose(logits, expected[2:], rtol=1e-4, atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["logits.npy", "out.npy"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["{model}", "hi", "--tap", "layers.1.attn.oute=x.npy"], 2, "did you mean"),
        (["{model}", "hi", "--tap", "nonsense"], 2, "NAME=FILE.npy"),
        (["{model}", "hi", "--temperature", "-1"], 2, "temperature"),
        (["{model}", "hi", "--min-p", "2", "--frequency-penalty", "9"], 2, "frequency_penalty"),
        (["{model}", "hi", "--json-schema", "none.json"], 2, "none.json"),
        (["{model}", "hi", "--prompt", "hi"], 2, "one prompt"),
        (["{model}", "--token-ids", "1,x"], 2, "token ids"),
        (["{model}", "--token-ids", "999"], 2, "vocabulary"),
        (["{model}"], 2, "no prompt"),
        (["{model}", "hi", "--devices", "quantum"], 4, "device.unknown"),
        (["missing/model.gguf", "hi"], 5, "weights.missing-file"),
        (["org/repo", "hi"], 2, "hf:org/repo"),
        (["llama.yaml", "hi"], 5, "weights.none"),
        (["missing.json", "hi"], 3, "plan.missing"),
    ],
)
def test_failures_have_their_exit_code(
    labinfer_cli: Cli, tmp_path: Path, tiny_model: Path, home: Path, arguments: list[str], exit_code: int, said: str
):
    words = [word.replace("{model}", str(tiny_model)) for word in arguments]
    result = labinfer_cli("run", *words)
    assert result.returncode == exit_code, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert os.listdir(tmp_path) == ["home"]


def test_a_prompt_too_long_is_refused_with_counts(labinfer_cli: Cli, tiny_model: Path):
    result = labinfer_cli("run", tiny_model, "--token-ids", ",".join(["5"] * 200))
    assert result.returncode == 2
    assert "200" in result.stderr
    assert "128" in result.stderr


def test_a_stale_or_edited_plan_does_not_run(labinfer_cli: Cli, tmp_path: Path, tiny_model: Path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    assert labinfer_cli("compile", model, "-o", "p.json").returncode == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    stale = labinfer_cli("run", "p.json", "hi")
    assert (stale.returncode, "p.json is stale: config changed" in stale.stderr) == (6, True)
    text = (tmp_path / "p.json").read_text()
    (tmp_path / "p.json").write_text(text.replace('"at": 0', '"at": 99999999', 1))
    edited = labinfer_cli("run", "p.json", "hi")
    assert (edited.returncode, "plan.arena-bounds" in edited.stderr) == (3, True)


def test_what_is_a_model_and_what_is_a_prompt(tmp_path: Path, home: Path):
    assert names_model(str(tmp_path))
    assert names_model("smollm2-135m")
    assert names_model("llama")
    assert names_model("hf:org/repo")
    assert names_model("no/such/model.gguf")
    assert not names_model("What is the capital of France?")
    assert not names_model("Hello")
    assert not names_model("x" * 100_000)
    assert not names_model("3/4 of a cake")
    with pytest.raises(UsageError) as failure:
        names_model("smolm2-135m")
    assert "smollm2-135m" in str(failure.value)


class Terminal:
    """A labinfer that believes it talks to a person."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, "-m", "labinfer", *map(str, arguments)])
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What was shown up to ``text``."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:
                    raise AssertionError(self.seen) from None
        shown, self.seen = self.seen.split(text, 1)
        return shown

    def send(self, text: str) -> None:
        """Type ``text``."""
        os.write(self.fd, text.encode())

    def exit_code(self) -> int:
        """The exit code, once it is done."""
        while True:
            try:
                if not os.read(self.fd, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_chat_remembers_clears_and_leaves(tiny_model: Path, home: Path):
    terminal = Terminal("run", tiny_model, "--max-new-tokens", 4)
    terminal.until(">>> ")
    terminal.send("/help\n")
    assert "/clear" in terminal.until(">>> ")
    terminal.send("w10\n")
    first = terminal.until(">>> ")
    terminal.send("w10\n")
    second = terminal.until(">>> ")
    terminal.send("/clear\n")
    terminal.until(">>> ")
    terminal.send("w10\n")
    again = terminal.until(">>> ")
    assert first.split() == again.split() != second.split()
    terminal.send("w10 " * 120 + "\n")
    assert "/clear" in terminal.until(">>> ")  # too long: said, and the chat goes on
    terminal.send("/bye\n")
    assert terminal.exit_code() == 0
    assert "w10" in (home / "chat_history").read_text()


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tiny_model: Path, home: Path):
    terminal = Terminal("run", tiny_model, "--ignore-eos", "--max-model-len", 128)
    terminal.until(">>> ")
    terminal.send("w10\n")
    terminal.until(" ")
    terminal.send("\x03")
    terminal.until(">>> ")
    terminal.send("\x04")
    assert terminal.exit_code() == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc to see that the process waits")
def test_ctrl_c_ends_a_run_with_130(tiny_model: Path):
    words = [sys.executable, "-m", "labinfer", "run", str(tiny_model)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        samples: list[list[str]] = []
        while len(samples) < 10 or any(sample != samples[-1] for sample in samples[-10:]) or samples[-1][0] != "S":
            stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            samples.append([stat[0], stat[11], stat[12]])  # state, user time, system time: it waits for its prompt
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said

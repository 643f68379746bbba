"""Processes of stages: a dead one is noticed and reported, and nothing is left behind, whoever dies."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import labinfer
from labinfer.errors import LabinferError, WeightsError
from labinfer.llm import LLM
from labinfer.runtime.pipeline.workers import ProcessFleet, StageProcesses
from labinfer.runtime.request import Request

from .service import wait_for
from .tiny import GOLDEN, tiny_plan

FOLDER = GOLDEN / "llama-llama3"
DEVICES = "reference,reference:1"
PROMPTS = [[5], [1, 2, 3]]
LONG = labinfer.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(running, pids))


def pids_of(model: LLM) -> list[int]:
    """The processes of a model's stages."""
    assert model.pipeline is not None
    assert isinstance(model.pipeline.workers, StageProcesses)
    return [stage.process.pid for stage in model.pipeline.workers.stages]


@cache
def answers() -> list[list[int]]:
    """What one device answers to ``PROMPTS``."""
    with labinfer.load(FOLDER, devices="reference", max_model_len=256) as model:
        return [list(answer.token_ids) for answer in model.generate(PROMPTS, LONG)]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_survive_a_dead_stage_and_have_the_same_tokens(transport: str, number: int) -> None:
    with labinfer.load(FOLDER, devices=DEVICES, transport=transport, max_model_len=256) as model:
        pids, engine = pids_of(model), model.engine
        with model.session() as session:
            before = session.append([1, 2, 3])
            requests = [engine.add(Request(prompt, LONG)) for prompt in PROMPTS]
            for _ in range(20):
                engine.step()
            os.kill(pids[1], number)
            engine.finish(requests)
            assert [request.generated for request in requests] == answers()
            assert all(request.error is None for request in requests)
            wait_until_gone(pids)
            np.testing.assert_allclose(session.append([4]), model.logits([1, 2, 3, 4])[3:], atol=1e-4)
            np.testing.assert_array_equal(before, model.logits([1, 2, 3]))
        assert model.blocks.usage == 0
        model.blocks.check_integrity()


def test_a_session_that_notices_starts_the_stages_again() -> None:
    with labinfer.load(FOLDER, devices=DEVICES, transport="shm") as model:
        expected = model.logits([1, 2])
        os.kill(pids_of(model)[0], signal.SIGKILL)
        with pytest.raises(LabinferError, match="stage 0"):
            model.logits([1, 2])
        np.testing.assert_array_equal(model.logits([1, 2]), expected)


def test_a_session_goes_on_where_it_was_when_the_stages_died() -> None:
    with labinfer.load(FOLDER, devices=DEVICES, transport="shm") as model, model.session() as session:
        expected = model.logits([1, 2, 3, 4])
        session.append([1, 2, 3])
        os.kill(pids_of(model)[1], signal.SIGKILL)
        wait_for(lambda: model.pipeline is not None and model.pipeline.broken is not None)
        np.testing.assert_allclose(session.append([4]), expected[3:], atol=1e-4)


def test_stages_that_were_ended_for_better_ones_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with labinfer.load(FOLDER, devices=DEVICES, transport="shm", max_model_len=256) as model:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            broken.setattr(ProcessFleet, "improved", True)
            request = model.engine.add(Request(PROMPTS[0], LONG))
            model.engine.finish([request])
        assert request.error is not None
        assert model.generate([PROMPTS[0]], LONG)[0].token_ids == answers()[0]


def test_stages_that_cannot_be_started_again_fail_their_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with labinfer.load(FOLDER, devices=DEVICES, transport="shm", max_model_len=256) as model:
        engine = model.engine
        request = engine.add(Request([5], LONG))
        engine.step()
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            os.kill(pids_of(model)[1], signal.SIGKILL)
            engine.finish([request])
        assert request.error is not None
        assert request.error.code == "pipeline.start"
        assert "exit code 1" in request.error.message
        request = engine.add(Request(PROMPTS[0], LONG))
        engine.finish([request])
        assert request.error is None
        assert request.generated == answers()[0]


def test_closing_ends_all_processes_and_descriptors() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0

    labinfer.load(FOLDER, devices=DEVICES, transport="shm").close()
    before, pids = descriptors(), []
    for transport in ("local", "shm", "tcp"):
        with labinfer.load(FOLDER, devices=DEVICES, transport=transport) as model:
            pids += pids_of(model) if transport != "local" else []
    wait_until_gone(pids)
    assert descriptors() == before


_PARENT = """
import sys, time, labinfer
model = labinfer.load(sys.argv[1], devices="reference,reference:1", transport=sys.argv[2])
print(*(stage.process.pid for stage in model.pipeline.workers.stages), flush=True)
time.sleep(60)
"""


@pytest.mark.alone
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_killed_parent_leaves_nothing(transport: str) -> None:
    memory = Path("/dev/shm")
    before = set(memory.iterdir()) if memory.is_dir() else set()
    command = [sys.executable, "-c", _PARENT, str(FOLDER), transport]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(running, pids))
        parent.kill()
    wait_until_gone(pids)
    assert not memory.is_dir() or {each for each in memory.iterdir() if "labinfer" in each.name} <= before


_CHATTY = """
import sys
from labinfer.runtime.pipeline.worker import Parent
parent = Parent(int(sys.argv[1]))
for number in range(3000):
    parent.say(loaded=number)
parent.say(ready=True)
sys.stdin.read()
"""


def test_a_parent_that_listens_late_hears_all() -> None:
    control, theirs = socket.socketpair()
    command = [sys.executable, "-c", _CHATTY, str(theirs.fileno())]
    with theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE) as child, control:
        theirs.close()
        time.sleep(1.5)
        heard = b""
        while b"ready" not in heard:
            received = control.recv(1 << 16)
            assert received, "the child gave up"
            heard += received
        assert heard.count(b"loaded") == 3000
        assert child.stdin is not None


def test_a_stage_that_ends_at_once_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LabinferError) as caught:
        labinfer.load(FOLDER, devices=DEVICES, transport="shm")
    assert caught.value.code == "pipeline.start"
    assert "exit code 1" in caught.value.message


def test_a_notebook_can_start_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # which has no descriptor
    with labinfer.load(FOLDER, devices=DEVICES, transport="shm") as model:
        assert model.logits([1, 2]).shape == (2, 96)


def test_a_stage_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path, devices=DEVICES)
    plan = labinfer.Plan.model_validate_json(path.read_text())
    plan.weights[-1].tensor = "nowhere"
    with pytest.raises(WeightsError, match="nowhere") as error:
        labinfer.load(plan, transport="shm")
    assert error.value.exit_code == 5

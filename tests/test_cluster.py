"""Stages on hosts: the tokens of one device, whatever dies, stops, comes back or speaks to the agents' ports."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import labinfer
from labinfer.cli.main import main
from labinfer.cluster import agents, stages
from labinfer.cluster import control as control_module
from labinfer.cluster.agent import Agent
from labinfer.cluster.checkpoints import PIECE_BYTES, Store, file_digest, manifest, provide
from labinfer.cluster.control import Control, open_control
from labinfer.cluster.fleet import ClusterFleet, load
from labinfer.cluster.neighbours import Neighbour
from labinfer.cluster.session import Session
from labinfer.cluster.token import kept_token, read_token, token_path
from labinfer.compiler.cluster import read_cluster
from labinfer.compiler.fold import unfold_ops, unfold_weights
from labinfer.compiler.graph import Weight
from labinfer.compiler.plan import Plan
from labinfer.errors import DoesNotFit, InvalidFile, LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.ops.formats import stored_bytes
from labinfer.runtime.pipeline.message import FETCH
from labinfer.runtime.pipeline.process import StageDied
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials, Keys
from labinfer.runtime.pipeline.transport.sealed import accept
from labinfer.runtime.pipeline.transport.tcp import connected_sockets
from labinfer.runtime.request import Request

from .hosts import Hosts
from .service import Served, wait_for
from .tiny import GOLDEN

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

FOLDER = GOLDEN / "gemma3_text-linear_global"
LIMITS = {"max_model_len": 256, "max_num_seqs": 4}
PROMPTS = [[5], [1, 2, 3]]
LONG = labinfer.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@cache
def answers() -> list[list[int]]:
    """What one device answers to ``PROMPTS``."""
    with labinfer.load(FOLDER, devices="reference", **LIMITS) as model:
        return [list(answer.token_ids) for answer in model.generate(PROMPTS, LONG)]


@pytest.fixture
def hosts(home: Path, tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, ["alpha", "beta", "gamma"])
    yield hosts
    hosts.close()


def fleet_of(model: LLM) -> ClusterFleet:
    assert isinstance(model.fleet, ClusterFleet)
    return model.fleet


def weights_by_device(plan: Plan) -> dict[str, set[Weight]]:
    weights = unfold_weights(plan)
    return {
        stage.device: {
            weights[name] for op, _ in unfold_ops(stage) for part in op.primitives() for name in part.weights.values()
        }
        for stage in plan.stages
    }


def expect_moved_only(model: LLM, before: Plan, lost: str | None) -> None:
    """The last start has loaded what no device had that was not lost, and nothing else."""
    had, now = weights_by_device(before), weights_by_device(model.plan)
    had.pop(f"reference@{lost}", None)
    moved = [weight for device, used in now.items() for weight in used - had.get(device, set())]
    stayed = [weight for device, used in now.items() for weight in used & had.get(device, set())]
    start = fleet_of(model).starts[-1]
    assert start.loaded == sum(stored_bytes(weight.format, weight.shape) for weight in moved)
    assert start.kept == sum(stored_bytes(weight.format, weight.shape) for weight in stayed)
    assert start.loaded
    assert start.kept


def used(model: LLM) -> list[str]:
    return [stage.device.partition("@")[2] for stage in model.plan.stages]


def begun(model: LLM) -> list[Request]:
    """Requests that have some of their tokens."""
    requests = [model.engine.add(Request(prompt, LONG)) for prompt in PROMPTS]
    for _ in range(20):
        model.engine.step()
    return requests


def finish(model: LLM, requests: list[Request]) -> None:
    model.engine.finish(requests)
    assert [request.error for request in requests] == [None, None]
    assert [request.generated for request in requests] == answers()


def kill_host(hosts: Hosts) -> None:
    hosts.kill("beta")


def stop_host(hosts: Hosts) -> None:
    for pid in [*hosts.stages("beta"), hosts.agents["beta"].pid]:
        os.kill(pid, signal.SIGSTOP)


def kill_stage(hosts: Hosts) -> None:
    os.kill(hosts.stages("beta")[0], signal.SIGKILL)


def stop_stage(hosts: Hosts) -> None:
    os.kill(hosts.stages("beta")[0], signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "left"),
    [(kill_host, 2), (stop_host, 2), (kill_stage, 3), (stop_stage, 3)],
    ids=["host killed", "host stopped", "stage killed", "stage stopped"],
)
def test_requests_survive(fault: Callable[[Hosts], None], left: int, hosts: Hosts) -> None:
    with load(FOLDER, hosts.file, **LIMITS) as model:
        assert used(model) == ["alpha", "beta", "gamma"]
        requests, before, pids = begun(model), model.plan, {name: hosts.stages(name) for name in hosts.agents}
        fault(hosts)
        finish(model, requests)
        assert len(used(model)) == left
        assert {name: hosts.stages(name) for name in ("alpha", "gamma")} == {
            name: pids[name] for name in ("alpha", "gamma")
        }
        expect_moved_only(model, before, "beta")


def test_a_host_that_returns_is_taken_back_in(hosts: Hosts) -> None:
    with load(FOLDER, hosts.file, **LIMITS) as model:
        requests = begun(model)
        hosts.kill("beta")
        finish(model, requests)
        assert used(model) == ["alpha", "gamma"]
        hosts.start("beta")
        until, before, pids = time.monotonic() + 60, model.plan, hosts.stages("alpha")
        while used(model) != ["alpha", "beta", "gamma"]:
            assert time.monotonic() < until
            finish(model, begun(model))
        assert hosts.stages("alpha") == pids
        expect_moved_only(model, before, None)


def test_a_stage_that_goes_on_has_what_it_had_before_and_nothing_else(hosts: Hosts) -> None:
    def descriptors() -> list[int]:
        pids = [*hosts.stages("alpha"), hosts.agents["alpha"].pid, os.getpid()]
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

    with load(FOLDER, hosts.file, **LIMITS) as model:
        counts = []
        for _ in range(3):
            finish(model, begun(model))
            counts.append(descriptors())
            kill_stage(hosts)
        assert counts[1] == counts[2]  # the first has read all weights, and keeps the file open


class Relay:
    """Passes on what comes to its own ``port`` to another; ``cut`` breaks the channels of stages, but no other way."""

    def __init__(self, port: int) -> None:
        self.there, self.listener = port, socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.channels: list[socket.socket] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self.listener.accept()
                other = socket.create_connection(("127.0.0.1", self.there))
                hello = caller.recv(38, socket.MSG_WAITALL)
                other.sendall(hello)
                if not hello[22:].startswith(b"control"):
                    self.channels += [caller, other]
                for ends in ((caller, other), (other, caller)):
                    threading.Thread(target=self.pass_on, args=ends, daemon=True).start()

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while received := source.recv(1 << 16):
                target.sendall(received)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for each in self.channels:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self.listener.close()


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_a_channel_that_breaks_while_all_hosts_answer_is_noticed(name: str, hosts: Hosts) -> None:
    with closing(Relay(hosts.ports[name])) as relay:
        file = hosts.file
        file.write_text(file.read_text().replace(str(hosts.ports[name]), str(relay.port)))
        with load(FOLDER, file, **LIMITS) as model:
            requests = begun(model)
            relay.cut()
            finish(model, requests)
            assert used(model) == ["alpha", "beta", "gamma"]
            assert len(fleet_of(model).starts) == 2


def test_what_a_failure_has_cost_is_told(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    with load(FOLDER, hosts.file, **LIMITS) as model:
        assert not caplog.messages
        requests = begun(model)
        hosts.kill("beta")
        finish(model, requests)
    lost, started = caplog.messages
    assert "beta" in lost or "alpha" in lost  # whose stage has lost the next one
    assert re.fullmatch(r"the stages run on alpha, gamma now: [\d.]+ kB loaded, [\d.]+ kB kept, in \d+\.\d s", started)


def test_what_the_survivors_cannot_hold_is_one_clear_error_until_hosts_return(home: Path, tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, ["alpha", "beta"], memory="600kB")
    try:
        with load(FOLDER, hosts.file, **LIMITS) as model:
            requests = begun(model)
            hosts.kill("beta")
            model.engine.finish(requests)
            for request in requests:
                assert isinstance(request.error, DoesNotFit)
            hosts.kill("alpha")
            [lost] = [model.engine.add(Request(PROMPTS[0], LONG))]
            model.engine.finish([lost])
            assert lost.error is not None
            assert lost.error.code == "cluster.no-hosts"
            hosts.start("alpha")
            hosts.start("beta")
            until = time.monotonic() + 60
            while None in agents.status(read_cluster(hosts.file)).values():
                assert time.monotonic() < until
            finish(model, begun(model))
    finally:
        hosts.close()


def test_a_service_whose_hosts_are_lost_says_so_until_they_return(home: Path, tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, ["alpha"])
    try:
        with load(FOLDER, hosts.file, **LIMITS) as model, closing(Served(model)) as api:
            body = {"prompt": PROMPTS[0], "max_tokens": 3, "ignore_eos": True}
            assert api.http.post("/v1/completions", json=body).status_code == 200
            hosts.kill("alpha")
            for _ in range(2):
                answer = api.http.post("/v1/completions", json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cluster.no-hosts")
                assert answer.headers["retry-after"] == "5"
            hosts.start("alpha")
            assert api.http.post("/v1/completions", json=body).status_code == 200
    finally:
        hosts.close()


def test_a_service_shows_its_hosts_and_what_became_of_them(hosts: Hosts) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 3, "ignore_eos": True}
    with load(FOLDER, hosts.file, **LIMITS) as model, closing(Served(model)) as api:

        def states() -> dict[str, str]:
            assert api.http.post("/v1/completions", json=body).status_code == 200
            return {host["name"]: host["state"] for host in api.http.get("/labinfer/v1/devices").json()["hosts"]}

        assert set(states().values()) == {"running"}
        found = api.http.get("/labinfer/v1/devices").json()
        assert [stage["host"] for stage in found["stages"]] == ["alpha", "beta", "gamma"]
        assert [(link["source"], link["target"]) for link in found["links"]] == [
            ("reference@alpha", "reference@beta"), ("reference@beta", "reference@gamma")
        ]  # fmt: skip
        assert all(link["bytes_per_token"] for link in found["links"])
        assert found["tokens"] >= 3
        assert found["hosts"][1]["address"] == f"127.0.0.1:{hosts.ports['beta']}"
        wait_for(lambda: api.http.get("/labinfer/v1/devices").json()["hosts"][1]["round_trip_seconds"])
        hosts.kill("beta")
        assert states() == {"alpha": "running", "beta": "lost", "gamma": "running"}
        [first, last] = api.http.get("/labinfer/v1/devices").json()["starts"]
        assert (first["hosts"], first["kept"]) == (["alpha", "beta", "gamma"], 0)
        assert last["hosts"] == ["alpha", "gamma"]
        assert last["loaded"] + last["kept"] >= first["loaded"]
        hosts.start("beta")
        wait_for(lambda: states()["beta"] == "back")
        wait_for(lambda: states()["beta"] == "running")


def test_ranks_that_would_share_memory_over_hosts_are_refused(one_host: tuple[Hosts, LLM]) -> None:
    hosts, _ = one_host
    path = hosts.folder / "two.yaml"
    path.write_text(f"{hosts.file.read_text()}\n  reference:1@alpha: {{}}\n")
    with pytest.raises(UsageError, match="on one host"):
        load(FOLDER, path, tensor_parallel_size=2, **LIMITS)


def test_a_head_that_dies_leaves_no_stage(hosts: Hosts) -> None:
    script = "import sys, time; from labinfer.cluster.fleet import load\n"
    script += "model = load(sys.argv[1], sys.argv[2]); print('ready', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(FOLDER), str(hosts.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == "ready\n"
        assert all(len(hosts.stages(name)) == 1 for name in hosts.agents)
        head.kill()
    until = time.monotonic() + 60
    while any(hosts.stages(name) for name in hosts.agents):
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosts, LLM]]:
    """A host whose stages run while strangers knock."""
    folder = tmp_path_factory.mktemp("hosts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABINFER_HOME", str(folder / "home"))
        hosts = Hosts(folder, ["alpha"])
        with load(FOLDER, hosts.file, **LIMITS) as model:
            yield hosts, model
        hosts.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=1, max_size=300))
def test_garbage_on_the_port_is_hung_up_on_and_stages_live(one_host: tuple[Hosts, LLM], garbage: bytes) -> None:
    hosts, model = one_host
    with socket.create_connection(("127.0.0.1", hosts.ports["alpha"])) as stranger:
        stranger.sendall(garbage)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(5)
        with suppress(ConnectionResetError):  # how a connection ends whose last bytes nobody has read
            assert stranger.recv(1) == b""
    assert model.generate([PROMPTS[0]], labinfer.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(hosts.stages("alpha")) == 1


def test_another_token_is_refused_and_told(one_host: tuple[Hosts, LLM], tmp_path: Path) -> None:
    hosts, _ = one_host
    other = tmp_path / "token"
    kept_token(other)
    with pytest.raises(LabinferError, match="another token"):
        agents.status(read_cluster(hosts.file), other)
    with pytest.raises(DoesNotFit, match="no host of the cluster answers"):
        load(FOLDER, hosts.file, token_file=other)


def test_what_an_agent_cannot_do_is_told_and_harms_nobody(one_host: tuple[Hosts, LLM]) -> None:
    hosts, model = one_host
    control = open_control(("127.0.0.1", hosts.ports["alpha"]), Credentials(read_token(token_path())))
    wrong = ({"do": "checkpoint", "files": files, "path": "/", "folder": True} for files in (3, []))
    for message in ({"do": "dance"}, {"do": "hello"}, *wrong, {"do": "piece", "files": [], "file": 1}, {}):
        with pytest.raises(LabinferError):
            control.ask(**message)
    control.release()
    assert model.generate([PROMPTS[0]], LONG)[0].token_ids == answers()[0]


def test_a_stage_that_is_sent_what_is_no_block_is_started_anew(one_host: tuple[Hosts, LLM]) -> None:
    _, model = one_host
    assert model.pipeline is not None
    model.pipeline.send(FETCH, 7, [np.zeros(1, np.int32)])
    with pytest.raises(StageDied, match="a block arrived that has no number"):
        model.pipeline.wait(99)
    assert model.generate([PROMPTS[0]], LONG)[0].token_ids == answers()[0]


def test_who_hears_nothing_for_long_takes_nobody_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "BEAT", 0.02)  # 25 within the silence, as late as one may come
    mine, theirs = connected_sockets()
    head, agent = Control(mine, Keys(b"h" * 32, b"a" * 32), 0.5), Control(theirs, Keys(b"a" * 32, b"h" * 32), 0.5)
    time.sleep(1.5)
    head.say(do="hello")
    assert agent.hear() == ({"do": "hello"}, b"")
    agent.say(done=True)
    assert head.hear() == ({"done": True}, b"")
    for each in (head, agent):
        each.release()


def test_an_answer_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "ANSWER_SECONDS", 0.5)
    mine, theirs = connected_sockets()
    head, agent = Control(mine, Keys(b"h" * 32, b"a" * 32), 10), Control(theirs, Keys(b"a" * 32, b"h" * 32), 10)
    with pytest.raises(ChannelClosed, match="no answer came"):  # although beats come
        head.ask(do="hello")
    for each in (head, agent):
        each.release()


def test_a_neighbour_that_falls_silent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "HOST_SILENCE", 0.5)
    monkeypatch.setattr(control_module, "BEAT", 0.02)
    token, told = Credentials(bytes(32)), list[str]()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other: list[Control] = []

        def answer() -> None:
            connection, _ = listener.accept()
            other.append(Control(connection, accept(connection, token)[1], 10))

        thread = threading.Thread(target=answer)
        thread.start()
        neighbour = Neighbour("beta", listener.getsockname(), token, told.append)
        thread.join(60)
        beats: list[object] = []
        monkeypatch.setattr(neighbour.control.clock, "hear", lambda *beat: beats.append(beat))
        wait_for(lambda: len(beats) > 50)  # twice as many as may be missed
        assert told == []
        other[0].saying.acquire()  # no beat is sent any more
        neighbour.thread.join(60)
        assert len(told) == 1
        assert "cannot reach host 'beta'" in told[0]
        other[0].saying.release()
        neighbour.close()
        other[0].release()


def test_stages_that_make_no_progress_are_given_up(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LOADING_SILENCE", 0.5)
    monkeypatch.setattr(Session, "start", lambda *_: None)  # an agent that never gets a stage to run
    listener = socket.create_server(("127.0.0.1", 0))
    with closing(Agent(listener, Credentials(kept_token()))) as agent:
        threading.Thread(target=agent.serve, daemon=True).start()
        file = tmp_path / "cluster.yaml"
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        file.write_text(f"hosts: {{alpha: {{address: '{address}'}}}}\ndevices: {{reference@alpha: {{}}}}")
        with pytest.raises(StageDied, match=r"no progress .* by alpha"):
            load(FOLDER, file, **LIMITS)


def test_whoever_asks_for_the_status_ends_nobody_elses_connection(one_host: tuple[Hosts, LLM]) -> None:
    hosts, _ = one_host
    new = open_control(("127.0.0.1", hosts.ports["alpha"]), Credentials(read_token(token_path())))
    assert agents.status(read_cluster(hosts.file))["alpha"] is not None
    assert new.ask(do="hello", owner="a head that took its time") == {}
    new.release()


def test_a_host_without_the_checkpoint_gets_a_copy_in_pieces(home: Path, tmp_path: Path) -> None:
    content = os.urandom(PIECE_BYTES + 1000)
    (tmp_path / "model.gguf").write_bytes(content)
    here = Path("/proc/self/cwd/model.gguf")  # another file in the agent's process
    hosts, before = Hosts(tmp_path, ["alpha"]), os.getcwd()
    try:
        control = open_control(("127.0.0.1", hosts.ports["alpha"]), Credentials(read_token(token_path())))
        os.chdir(tmp_path)
        copy = Path(provide(control.ask, here))
        assert copy.read_bytes() == content
        assert home in copy.parents
        assert provide(control.ask, here) == str(copy)
        assert provide(control.ask, tmp_path / "model.gguf") == str(tmp_path / "model.gguf")
        control.release()
    finally:
        os.chdir(before)
        hosts.close()


def test_a_damaged_piece_is_noticed_and_an_interrupted_copy_goes_on(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"abcdef")
    wanted, store = {**manifest(path, digests=True), "path": "/nowhere/model.gguf"}, Store()
    assert wanted["files"][0]["sha256"] == file_digest(path)
    assert store.find(wanted) == {"file": 0, "offset": 0}
    assert store.add({**wanted, "file": 0, "offset": 0}, b"abc") == {"file": 0, "offset": 3}
    with pytest.raises(LabinferError, match="not asked for"):
        store.add({**wanted, "file": 0, "offset": 0}, b"abc")
    with pytest.raises(LabinferError, match="arrived damaged"):
        store.add({**wanted, "file": 0, "offset": 3}, b"xyz")
    assert store.find(wanted) == {"file": 0, "offset": 0}
    assert "path" in store.add({**wanted, "file": 0, "offset": 0}, b"abcdef")
    with pytest.raises(LabinferError, match="plain names"):
        store.find({**wanted, "files": [{"name": "../model.gguf", "size": 6, "sha256": ""}]})
    outside = {"name": str(tmp_path / "outside"), "size": 6, "sha256": wanted["files"][0]["sha256"]}
    with pytest.raises(LabinferError, match="plain names"):
        store.add({**wanted, "files": [outside], "file": 0, "offset": 0}, b"abcdef")
    assert not (tmp_path / "outside").exists()


def test_tokens_are_for_their_owner_only(home: Path) -> None:
    token = kept_token()
    assert len(token) == 32
    assert kept_token() == token
    assert stat.S_IMODE(token_path().stat().st_mode) == 0o600
    token_path().chmod(0o644)
    with pytest.raises(LabinferError, match="others can read"):
        kept_token()
    token_path().chmod(0o600)
    token_path().write_text("short")
    with pytest.raises(LabinferError, match="64 hexadecimal digits"):
        kept_token()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


FAKE_SSH = """#!/bin/sh
shift 3
exec env HOME={home} sh -c "$1"
"""


@pytest.mark.parametrize("ssh", [False, True])
def test_up_status_and_down(ssh: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    file, port = tmp_path / "cluster.yaml", free_port()
    how = f", ssh: me@alpha, python: {sys.executable}" if ssh else ""
    file.write_text(f"hosts:\n  alpha: {{address: '127.0.0.1:{port}'{how}}}\ndevices:\n  reference@alpha: {{}}\n")
    if ssh:
        script = tmp_path / "bin" / "ssh"
        script.parent.mkdir()
        script.write_text(FAKE_SSH.format(home=tmp_path))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    assert main(["cluster", "status", str(file)]) == 1
    assert "no answer from alpha" in capsys.readouterr().err
    for told in ("started", "runs already"):
        assert main(["cluster", "up", str(file)]) == 0
        assert capsys.readouterr().out == f"alpha (127.0.0.1:{port}): {told}\n"
    assert main(["cluster", "status", str(file)]) == 0
    assert "reference" in capsys.readouterr().out
    arguments = ["run", str(FOLDER), "--cluster", str(file), "--token-ids", "5", "--temperature", "0"]
    assert main([*arguments, "--max-new-tokens", "3", "--ignore-eos"]) == 0
    assert capsys.readouterr().out == ",".join(map(str, answers()[0][:3])) + "\n"
    assert main([*arguments, "--devices", "reference"]) == 2
    assert main([*arguments, "--transport", "shm"]) == 2
    assert "over a cluster there is no --transport" in capsys.readouterr().err
    bench = ["bench", str(FOLDER), "--cluster", str(file), "--prompt-lengths", "20", "--decode-lengths", "6", "--json"]
    assert main([*bench, "--batch", "2", "--repeat", "2"]) == 0
    tests = json.loads(capsys.readouterr().out)["tests"]
    assert [(test["kind"], test["tokens_per_second"] > 0) for test in tests] == [("prefill", True), ("decode", True)]
    assert main([*bench, "--compare"]) == 2
    assert "over a cluster there is no --compare" in capsys.readouterr().out
    for told in ("ended", "did not run"):
        assert main(["cluster", "down", str(file)]) == 0
        assert capsys.readouterr().out == f"alpha (127.0.0.1:{port}): {told}\n"


def test_cluster_files_for_hosts(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("devices: {reference: {}}")
    with pytest.raises(InvalidFile, match="names no hosts"):
        load(FOLDER, file)
    file.write_text("hosts: {alpha: {address: 'alpha:1'}}\ndevices: {reference@alhpa: {}, reference: {}}")
    with pytest.raises(LabinferError, match="no device or host 'alhpa'"):
        read_cluster(file)
    file.write_text("hosts: {alpha: {address: 'alpha:1', ssh: -oProxyCommand=x}}\ndevices: {reference@alpha: {}}")
    with pytest.raises(LabinferError, match="ssh"):
        read_cluster(file)
    with pytest.raises(UsageError, match="cannot be planned anew"):
        load("plan.json", file)

"""Certificates between hosts: what is said cannot be read on the way, and who is not believed is told why."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import trustme

import labinfer
from labinfer.cli.main import main
from labinfer.cluster import agents
from labinfer.cluster.control import Control, open_control
from labinfer.cluster.fleet import load
from labinfer.cluster.profiling import measure_hop
from labinfer.cluster.token import credentials_of, kept_token
from labinfer.compiler.cluster import read_cluster
from labinfer.errors import DoesNotFit, LabinferError
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials, Distrusted, Keys, Sealed, Tls
from labinfer.runtime.pipeline.transport.channel import arrived
from labinfer.runtime.pipeline.transport.tcp import connected_sockets
from labinfer.runtime.pipeline.transport.tls import context_of

from .hosts import Hosts
from .test_cluster import FOLDER, LIMITS, PROMPTS, answers, begun, finish, free_port, used
from .test_transport import Inbox

LIMIT = 4 << 20
KEYS = Keys(b"a" * 32, b"b" * 32)
HERE = "127.0.0.1"
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


class Authority:
    """Signs certificates, whose files are in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.ca = folder, trustme.CA()
        self.ca.cert_pem.write_to_path(folder / "ca.pem")

    def sign(self, *names: str, expired: datetime.datetime | None = None) -> Tls:
        """The files of a certificate for ``names``."""
        certificate = self.ca.issue_cert(*names, not_after=expired, not_before=expired and LONG_AGO)
        stem = self.folder / f"host{len(list(self.folder.iterdir()))}"
        files = Tls(f"{stem}.pem", f"{stem}.key", str(self.folder / "ca.pem"))
        certificate.cert_chain_pems[0].write_to_path(files.certificate)
        certificate.private_key_pem.write_to_path(files.key)
        os.chmod(files.key, 0o600)
        return files


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Tls:
    """The files of a host at this address."""
    return authority.sign(HERE)


def sealed(connection: socket.socket, tls: Tls, calls: bool) -> Sealed:
    """An end that has called, or was called."""
    mine, theirs = (KEYS.mine, KEYS.theirs) if calls else (KEYS.theirs, KEYS.mine)
    return Sealed(connection, LIMIT, Keys(mine, theirs, tls._replace(called=HERE if calls else "")))


@pytest.fixture
def ends(tls: Tls) -> Iterator[tuple[Sealed, Sealed]]:
    one, other = connected_sockets()
    caller, listener = sealed(one, tls, True), sealed(other, tls, False)
    yield caller, listener
    caller.release()
    listener.release()


def frames(sizes: list[int], count: int = 1) -> list[tuple[int, int, list[bytes]]]:
    return [(1, tag, [bytes([tag + 1]) * size for size in sizes]) for tag in range(count)]


def send_all(end: Sealed, frames: list[tuple[int, int, list[bytes]]]) -> None:
    for kind, tag, sections in frames:
        end.send(kind, tag, [memoryview(each) for each in sections])


@pytest.mark.parametrize("caller_sends", [True, False], ids=["caller", "listener"])
@pytest.mark.parametrize("sizes", [[0, 3], [20_000, 5], [100, 3_000_000]])
def test_frames_come_whole_whoever_begins(sizes: list[int], caller_sends: bool, ends: tuple[Sealed, Sealed]) -> None:
    sender, receiver = ends if caller_sends else reversed(ends)
    with ThreadPoolExecutor(1) as pool:
        sent = frames(sizes, 3)
        sending = pool.submit(send_all, sender, sent)  # shakes hands with who receives
        inbox = Inbox(receiver)
        assert [inbox.receive() for _ in sent] == sent
        sending.result()


def test_both_may_send_at_the_same_time_once_they_have_agreed(ends: tuple[Sealed, Sealed]) -> None:
    sent = frames([50_000, 0, 70], 40)
    with ThreadPoolExecutor(4) as pool:
        for agreed in [pool.submit(end.agree, 10) for end in ends]:
            agreed.result()
        sending = [pool.submit(send_all, end, sent) for end in ends]
        heard = [pool.submit(lambda end: [Inbox(end).receive() for _ in sent], end) for end in ends]
        assert all(each.result() == sent for each in heard)
        for each in sending:
            each.result()


def test_what_was_taken_from_the_connection_already_is_not_waited_for(ends: tuple[Sealed, Sealed]) -> None:
    sender, receiver = ends
    with ThreadPoolExecutor(1) as pool:
        agreed = pool.submit(sender.agree, 10)
        receiver.agree(10)
        agreed.result()
    assert not receiver.ready()
    assert not receiver.fetch()
    for text in (b"first words", b"second"):
        sender.way.sendmsg([memoryview(text)])
    taken = memoryview(bytearray(5))
    while not arrived(receiver.connection, 10):
        pass
    for left in (b"first", b" word", b"ssec"):
        assert receiver.way.recv_into(taken[: len(left)]) == len(left)
        assert taken[: len(left)] == left
        assert receiver.ready()
    assert receiver.way.recv_into(taken) == 3
    assert not receiver.ready()


def test_an_expected_frame_is_received_into_its_sections(ends: tuple[Sealed, Sealed]) -> None:
    sender, receiver = ends
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_all, sender, frames([48, 2304], 20))
        for tag in range(20):
            taken = [bytearray(48), bytearray(2304)]
            receiver.expect(1, tag, [memoryview(each) for each in taken])
            while not receiver.fetch():
                pass
            receiver.receive(lambda header, taken=taken: [memoryview(each) for each in taken])
            assert taken == [bytes([tag + 1]) * 48, bytes([tag + 1]) * 2304]
        sending.result()


def relay(source: socket.socket, target: socket.socket, heard: bytearray) -> None:
    """Pass on what comes, and note it."""
    while received := source.recv(1 << 16):
        heard += received
        target.sendall(received)
    target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("encrypts", [True, False])
def test_who_listens_on_the_way_reads_nothing(encrypts: bool, tls: Tls) -> None:
    heard, words = bytearray(), b"nobody else should read these words"
    (one, near), (far, other) = connected_sockets(), connected_sockets()
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        for each in (near, far):
            stack.callback(each.close)
        for source, target in ((near, far), (far, near)):
            pool.submit(relay, source, target, heard)
        if encrypts:
            sender, receiver = sealed(one, tls, True), sealed(other, tls, False)
        else:
            sender, receiver = Sealed(one, LIMIT, KEYS), Sealed(other, LIMIT, Keys(KEYS.theirs, KEYS.mine))
        sent = pool.submit(send_all, sender, [(1, 7, [words])])
        assert Inbox(receiver).receive() == (1, 7, [words])
        sent.result()
        sender.release()
        receiver.release()
    assert (words in heard) is not encrypts


def both_agree(caller: Tls, listener: Tls) -> list[str]:
    """Why the caller and the listener do not agree."""
    one, other = connected_sockets()
    found = []
    with closing(one), closing(other), ThreadPoolExecutor(2) as pool:
        ends = [sealed(one, caller, True), sealed(other, listener, False)]
        for agreed in [pool.submit(end.agree, 10) for end in ends]:
            error = agreed.exception()
            assert isinstance(error, Distrusted)
            assert error.code == "cluster.tls"
            found.append(str(error))
    return found


def test_a_certificate_of_another_authority_is_refused(tls: Tls, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").sign(HERE)
    caller, listener = both_agree(tls._replace(certificate=other.certificate, key=other.key), tls)
    assert "refuses this one's certificate: " in caller
    assert "alert unknown ca" in caller
    assert "the other end's certificate is refused: unable to get local issuer certificate" in listener
    caller, listener = both_agree(tls, tls._replace(certificate=other.certificate, key=other.key))
    assert "the other end's certificate is refused: unable to get local issuer certificate" in caller
    assert "alert unknown ca" in listener


def test_an_expired_certificate_is_refused(authority: Authority, tls: Tls) -> None:
    expired = authority.sign(HERE, expired=datetime.datetime(2021, 1, 1, tzinfo=datetime.UTC))
    assert "alert certificate expired" in both_agree(expired, tls)[0]
    assert "is refused: certificate has expired" in both_agree(tls, expired)[0]


def test_a_certificate_must_name_the_host_that_was_called(authority: Authority, tls: Tls) -> None:
    named = authority.sign("alpha.example", "10.1.2.3")
    assert "certificate is not valid for '127.0.0.1'" in both_agree(tls, named)[0]


def test_a_caller_without_a_certificate_is_refused(tls: Tls) -> None:
    one, other = connected_sockets()
    context = ssl.create_default_context(cafile=tls.ca)
    with closing(one), closing(other), ThreadPoolExecutor(1) as pool:
        agreed = pool.submit(sealed(other, tls, False).agree, 10)
        with context.wrap_socket(one, server_hostname=HERE) as stranger, pytest.raises(ssl.SSLError):
            stranger.recv(1)
        with pytest.raises(Distrusted, match="peer did not return a certificate"):
            agreed.result()


def test_garbage_instead_of_tls_is_refused(tls: Tls) -> None:
    one, other = connected_sockets()
    with closing(one), closing(other):
        one.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(Distrusted, match="there is no TLS"):
            sealed(other, tls, False).agree(10)


def test_who_says_nothing_is_not_waited_for(tls: Tls) -> None:
    one, other = connected_sockets()
    with closing(one), closing(other), pytest.raises(ChannelClosed, match="timed out"):
        sealed(other, tls, False).agree(0.05)


def test_files_that_are_no_certificates_are_told(authority: Authority, tls: Tls, tmp_path: Path) -> None:
    for wrong in ("certificate", "key", "ca"):
        with pytest.raises(LabinferError, match="no certificates, as PEM"):
            context_of(tls._replace(**{wrong: str(tmp_path / "missing.pem")}))
    with pytest.raises(LabinferError, match="no certificates, as PEM"):
        context_of(tls._replace(key=authority.sign(HERE).key))
    os.chmod(tls.key, 0o640)
    with pytest.raises(LabinferError, match="others can read the private key"):
        context_of(tls)
    os.chmod(tls.key, 0o600)


def test_nobody_is_asked_for_the_password_of_a_key(tls: Tls, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key(Path(tls.key).read_bytes(), None)
    path = tmp_path / "locked.key"
    locked = form.BestAvailableEncryption(b"secret")
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked))
    path.chmod(0o600)
    with pytest.raises(LabinferError, match="no certificates, as PEM"):
        context_of(tls._replace(key=str(path)))


# Whole clusters


@pytest.fixture
def hosts(home: Path, tmp_path: Path, tls: Tls) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, ["alpha", "beta", "gamma"], tls=tls)
    yield hosts
    hosts.close()


def test_tokens_are_those_of_one_device_and_a_lost_host_is_planned_around(hosts: Hosts) -> None:
    with load(FOLDER, hosts.file, **LIMITS) as model:
        assert used(model) == ["alpha", "beta", "gamma"]
        finish(model, begun(model))
        requests = begun(model)
        hosts.kill("beta")
        finish(model, requests)
        assert used(model) == ["alpha", "gamma"]
        assert model.generate([PROMPTS[0]], labinfer.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))


def test_links_are_measured_as_stages_use_them(hosts: Hosts) -> None:
    cluster = read_cluster(hosts.file)
    credentials = credentials_of(cluster)
    controls = {name: open_control(cluster.hosts[name].endpoint, credentials) for name in ("alpha", "beta")}
    assert measure_hop(cluster, controls, "alpha", "beta").latency > 0
    for each in controls.values():
        each.release()


def test_hosts_that_are_not_believed_are_left_out_and_told_of(
    hosts: Hosts, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    hosts.kill("beta")
    hosts.tls, believed = authority.sign("elsewhere.example"), hosts.tls
    hosts.start("beta")
    hosts.tls = believed
    with load(FOLDER, hosts.file, **LIMITS) as model:
        assert used(model) == ["alpha", "gamma"]
        finish(model, begun(model))
    assert "host 'beta' is left out: the other end's certificate is refused" in caplog.text
    with pytest.raises(LabinferError, match=r"127.0.0.1:\d+: the other end's certificate is refused"):
        agents.status(read_cluster(hosts.file))


def test_a_head_without_certificates_is_told_that_hosts_encrypt(hosts: Hosts) -> None:
    file = hosts.file
    file.write_text("\n".join(file.read_text().splitlines()[1:]))
    with pytest.raises(DoesNotFit, match=r"no host of the cluster answers: alpha .* encrypts connections"):
        load(FOLDER, file, **LIMITS)
    with pytest.raises(Distrusted, match="encrypts connections"):
        open_control((HERE, hosts.ports["alpha"]), Credentials(kept_token()))
    assert "was not ended: " in agents.down(read_cluster(file))["alpha"]


def test_hosts_without_certificates_are_refused(home: Path, tmp_path: Path, tls: Tls) -> None:
    with closing(Hosts(tmp_path, ["alpha"])) as hosts:
        hosts.tls = tls
        with pytest.raises(LabinferError, match="does not encrypt connections"):
            agents.status(read_cluster(hosts.file))


def test_an_agent_needs_certificates_that_can_be_read(home: Path, tmp_path: Path, tls: Tls) -> None:
    token = tmp_path / "token"
    kept_token(token)
    command = [sys.executable, "-m", "labinfer.cluster.agent", "--address", "127.0.0.1:0", "--token-file", str(token)]
    done = subprocess.run([*command, "--tls", tls.certificate, tls.key, "nowhere.pem"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "error[cluster.tls]: no certificates, as PEM, can be read" in done.stderr


def test_a_refused_head_is_told_of_in_the_log_of_the_agent(
    home: Path, tls: Tls, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(Hosts(tmp_path, ["alpha"], tls=tls)) as hosts:
        other = Authority(tmp_path / "other").sign(HERE)
        stranger = tls._replace(certificate=other.certificate, key=other.key)
        with pytest.raises(Distrusted, match="unknown ca"):
            open_control((HERE, hosts.ports["alpha"]), Credentials(kept_token(), stranger))
    assert "refused a connection: the other end's certificate is refused" in capfd.readouterr().err


def test_up_and_down_with_certificates_beside_the_file(
    home: Path, tmp_path: Path, tls: Tls, capsys: pytest.CaptureFixture[str]
) -> None:
    file, port = tmp_path / "cluster.yaml", free_port()
    for name, path in zip(("host.pem", "host.key", "ca.pem"), tls, strict=False):
        (tmp_path / name).write_bytes(Path(path).read_bytes())
        (tmp_path / name).chmod(0o600)
    file.write_text(
        f"hosts: {{alpha: {{address: '{HERE}:{port}'}}}}\ndevices: {{reference@alpha: {{}}}}\n"
        "tls: {certificate: host.pem, key: host.key, ca: ca.pem}\n"
    )
    assert credentials_of(read_cluster(file)).tls is not None
    assert main(["cluster", "up", str(file)]) == 0
    assert main(["cluster", "status", str(file)]) == 0
    capsys.readouterr()
    arguments = ["run", str(FOLDER), "--cluster", str(file), "--token-ids", "5", "--temperature", "0"]
    assert main([*arguments, "--max-new-tokens", "3", "--ignore-eos"]) == 0
    assert capsys.readouterr().out == ",".join(map(str, answers()[0][:3])) + "\n"
    assert main(["cluster", "down", str(file)]) == 0
    assert "ended" in capsys.readouterr().out


def test_beats_and_answers_cross_each_other(tls: Tls) -> None:
    one, other = connected_sockets()
    found: list[Control] = []
    keys = sealed(other, tls, False).keys
    thread = threading.Thread(target=lambda: found.append(Control(other, keys, 10)))
    thread.start()
    head = Control(one, sealed(one, tls, True).keys, 10)
    thread.join(10)
    [agent] = found
    payload = bytes(range(256)) * 4096
    with ThreadPoolExecutor(1) as pool:
        for number in range(20):
            heard = pool.submit(agent.hear, 10)
            head.say(payload, number=number)
            assert heard.result() == ({"number": number}, payload)
            agent.say(number=-number)
            assert head.hear(10)[0] == {"number": -number}
    for each in (head, agent):
        each.release()

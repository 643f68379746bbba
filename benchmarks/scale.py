"""What limits 1,000 hosts: the event simulator over declared devices, and what each part of the head costs here.

    python benchmarks/scale.py [PART ...] [--hosts 1000]

Parts: `planning` (compiling over so many hosts), `head` (the engine's own time per step, with stages that answer at
once), `chains` (the simulator: hosts as chains, with that head before them), `beats` (control connections that only
beat), `probes` (asking every host whether it answers), `bytes` (what crosses the head's network card). docs/scale.md
says what follows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import labinfer
from labinfer.cluster.control import Control
from labinfer.compiler.costs.roofline import specification
from labinfer.compiler.partition import Device, DeviceKind, Layer, Link, Objective, Problem, Workload, partition
from labinfer.compiler.partition.simulate import Simulation, simulate
from labinfer.compiler.plan import Plan
from labinfer.errors import DoesNotFit
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.runtime.model import Model
from labinfer.runtime.pipeline.message import TOKENS, decode
from labinfer.runtime.pipeline.process import BEAT
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials, Header, Keys
from labinfer.runtime.pipeline.transport.sealed import connect
from labinfer.runtime.pipeline.transport.tcp import connected_sockets
from labinfer.runtime.request import Request

HOP = Link(latency=47e-6 + 100e-6, bandwidth=1.25e9)
"""Between hosts: a sealed hop as `benchmarks/transport.py` measures it, and the assumed link of 10 Gbit/s."""

KINDS = ("h100-80g", "a100-80g", "l4")
LAYERS, HIDDEN, INNER, VOCABULARY = 126, 16384, 53248, 128256  # Llama 3.1 405B
LAYER_BYTES = 2 * (HIDDEN * (HIDDEN + 2 * 1024 + HIDDEN) + 3 * HIDDEN * INNER)
KV_BYTES = 2 * 4 * 1024
SEQUENCES, PROMPT, ANSWER = 8, 512, 128  # of a micro-batch
AGENTS = """
import socket, sys, threading
from labinfer.cluster.agent import Agent
from labinfer.runtime.pipeline.transport import Credentials
for _ in range(int(sys.argv[1])):
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    threading.Thread(target=Agent(listener, Credentials(bytes(32))).serve, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


def configuration(folder: Path, **sizes: int) -> Path:
    """A config.json of Llama's shape."""
    known: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
    known |= {"rope_theta": 5e5, "max_position_embeddings": 8192, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(known | sizes))
    return folder / "config.json"


def planning(hosts: int) -> None:
    """Seconds of `labinfer compile --cluster` over more and more hosts of three kinds."""
    with tempfile.TemporaryDirectory() as folder:
        model = configuration(
            Path(folder), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=128, num_key_value_heads=8,
        )  # fmt: skip
        for count in (hosts // 16, hosts // 4, hosts):
            lines = [f"  gpu{number}: {{like: {KINDS[number % 3]}, host: h{number}}}" for number in range(count)]
            cluster = Path(folder) / "cluster.yaml"
            cluster.write_text("\n".join(["devices:", *lines]))
            started = time.perf_counter()
            work = {"objective": "throughput", "workload": f"prompt={PROMPT},output={ANSWER},concurrency=64"}
            plan = labinfer.compile(model, cluster=cluster, **work)
            seconds = time.perf_counter() - started
            assert plan.placement is not None
            written = len(plan.model_dump_json(exclude_defaults=True))
            told = f"{len(plan.stages)} stages ({plan.placement.algorithm}), {written / 1e3:.0f} kB of plan"
            print(f"planning {count:5} hosts: {seconds:6.2f} s, {told}, sent to each of them")


class Echo:
    """Stages that answer every step at once, with token 0 for each row of logits; see `Workers` and `Channel`."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.answers = plan, queue.SimpleQueue[tuple[int, int] | None]()
        self.senders, self.receiver = [self], self

    def send(self, kind: int, tag: int, sections: Sequence[memoryview]) -> None:
        message = decode(np.frombuffer(sections[0], np.int32), self.plan.limits)
        self.answers.put((tag, len(message.batch.logits_rows)))

    def receive(self, place: Any) -> Header:
        answer = self.answers.get()
        if answer is None:
            raise ChannelClosed
        tag, rows = answer
        header = Header(TOKENS, tag, (4 * rows, 16 * len(self.plan.groups)))
        for buffer in place(header):
            buffer[:] = bytes(buffer.nbytes)
        return header

    def watch(self, died: Any) -> None:
        """Nobody dies."""

    def stop(self) -> None:
        self.answers.put(None)

    def release(self) -> None:
        """Nothing is left."""

    kill = stop


class EchoFleet:
    """Starts `Echo`."""

    improved = False

    def start(self, plan: Plan) -> Any:
        return Echo(plan)

    def observe(self, times: np.ndarray) -> None:
        """Nothing to learn."""

    def close(self) -> None:
        """Nothing to end."""


def head_seconds(stages: int, steps: int = 40) -> float:
    """Seconds of the processor that the head needs for a step of a micro-batch, all groups of `stages` being full."""
    with tempfile.TemporaryDirectory() as folder:
        model = configuration(
            Path(folder), hidden_size=32, intermediate_size=32, num_hidden_layers=stages, num_attention_heads=2
        )
        devices = ",".join(f"reference:{number}={number}" for number in range(stages))
        limits = {"max_num_seqs": stages * SEQUENCES, "max_num_batched_tokens": 512, "max_model_len": 256}
        plan = labinfer.compile(model, devices=devices, **limits)
    params = labinfer.SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    with Model(plan, SyntheticCheckpoint(plan), transport=EchoFleet()) as echo:  # type: ignore[arg-type]
        engine = echo.engine
        for number in range(stages * SEQUENCES):
            engine.add(Request([number % 100 + 1], params))
        for _ in range(2 * stages):
            engine.step()
        begun, started = engine.stats[-1].time, time.process_time()
        for _ in engine.run():
            pass
        spent, done = time.process_time() - started, sum(each.time > begun for each in engine.stats)
        return spent / max(done, 1)


def head(hosts: int) -> None:
    """The engine's own time per step, by the number of stages."""
    for stages in (1, 8, 32, 126):
        seconds = head_seconds(stages)
        rate = SEQUENCES / seconds
        print(
            f"head     {stages:5} stages: {1e6 * seconds:6.0f} µs a step of {SEQUENCES} sequences, {rate:.0f} tokens/s"
        )


def chain_problem(hosts: int, heads_share: int, head_step: float) -> Problem:
    """The model over so many hosts, behind a head that `heads_share` such chains share."""
    layers = [Layer("head", 0, 0, 4 * SEQUENCES)]
    layers += [Layer(f"layers.{number}", LAYER_BYTES, KV_BYTES, 4 * HIDDEN) for number in range(LAYERS)]
    step = head_step * heads_share
    never = (float("inf"),) * LAYERS
    devices = [Device("head", DeviceKind("head", (step, *never), (step, *never)), 1 << 30)]
    kinds = []
    for name in KINDS:
        spec = specification(name)
        decode = LAYER_BYTES / (1e9 * spec.gb_per_second * spec.read)
        prefill = max(decode, LAYER_BYTES * PROMPT / (1e12 * spec.tflops * spec.computed))  # 2 FLOP a weight of 2 bytes
        times = (float("inf"), *[prefill] * LAYERS), (float("inf"), *[decode] * LAYERS)
        kinds.append((DeviceKind(name, *times), spec.memory))
    devices += [Device(f"h{number}", *kinds[number % 3]) for number in range(hosts)]
    length, flights = PROMPT + ANSWER, min(hosts, LAYERS)
    work = Workload(SEQUENCES, ANSWER, PROMPT, SEQUENCES, flights * SEQUENCES * length, flights)
    return Problem(tuple(layers), tuple(devices), work, default_link=HOP, pins={"head": "head"})


def served(hosts: int, share: int, head_step: float) -> tuple[Simulation, int]:
    """What a chain over `hosts` serves, and its stages but for the head."""
    problem = chain_problem(hosts, share, head_step)
    plan = partition(problem, Objective.THROUGHPUT, effort_seconds=1.0)
    return simulate(problem, plan, units=3 * problem.workload.micro_batches), len(plan.stages) - 1


def chains(hosts: int) -> None:
    """All hosts as chains of more or fewer of them: with a head for each chain, and with one head for all."""
    for size in (20, 32, 64, 125, 250, 500, 1000):
        share = max(1, hosts // size)
        try:
            head_step = head_seconds(min(size, LAYERS))
            own, stages = served(size, 1, head_step)
            one, _ = served(size, share, head_step)
        except DoesNotFit:
            print(f"chains   {size:5} hosts each: the model does not fit")
            continue
        tokens = SEQUENCES * ANSWER * share
        told = f"{tokens * own.units_per_second:8.0f} tokens/s with a head each"
        told += f", {tokens * one.units_per_second:8.0f} with one; a unit in {own.median_seconds:.0f} s"
        print(f"chains   {share:3} of {size:4} hosts ({stages} used): {told}")


def beats(hosts: int) -> None:
    """The processor's time for control connections to so many hosts that say nothing but beats; both ends are here."""
    keys, pairs = Keys(bytes(32), bytes(32)), []
    for _ in range(hosts):
        pairs += [Control(end, keys, 60.0) for end in connected_sockets()]
    with ThreadPoolExecutor(len(pairs)) as pool:
        for control in pairs:
            pool.submit(listen, control)
        time.sleep(2)
        started, spent = time.perf_counter(), time.process_time()
        time.sleep(5)
        share = (time.process_time() - spent) / (time.perf_counter() - started) / 2
        for control in pairs:
            control.close()
    for control in pairs:
        control.release()
    print(f"beats    {hosts:5} hosts: {100 * share:.1f} % of a core at the head, {2 * hosts} threads, each {BEAT} s")


def listen(control: Control) -> None:
    """Hear beats until the connection is closed."""
    with contextlib.suppress(ChannelClosed):
        control.hear()


def probes(hosts: int) -> None:
    """Seconds until so many hosts were asked whether they answer, as before each new plan; agents are here too."""
    count = -(-hosts // 32)
    with subprocess.Popen([sys.executable, "-c", AGENTS, str(count)], stdin=-1, stdout=-1, text=True) as agents:
        assert agents.stdout is not None
        ports = [int(agents.stdout.readline()) for _ in range(count)]

        def ask(number: int) -> bool:
            try:
                connect(("127.0.0.1", ports[number % count]), Credentials(bytes(32)), b"control", 2.0)[0].close()
            except ChannelClosed:
                return False
            return True

        started = time.perf_counter()
        with ThreadPoolExecutor(hosts) as pool:
            answered = sum(pool.map(ask, range(hosts)))
        seconds = time.perf_counter() - started
        agents.terminate()
    print(f"probes   {hosts:5} hosts: {seconds:.2f} s, {answered} answered")


def bytes_(hosts: int) -> None:
    """Bytes a token at the head's network card: of greedy sequences, and of those whose logits the head must see."""
    for what, made in (("greedy", 4), ("sampled", 4 * VOCABULARY)):
        sent = 4 * (5 + 1024 // 16 + 1)  # what a step says of a sequence: the batch, and its row of the block table
        rate = HOP.bandwidth / max(sent, made)
        print(f"bytes    {what}: {sent} out, {made} in for each token: {rate:.0f} tokens/s over 10 Gbit/s")


PARTS = {"planning": planning, "head": head, "chains": chains, "beats": beats, "probes": probes, "bytes": bytes_}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], metavar="PART")
    parser.add_argument("--hosts", type=int, default=1000)
    options = parser.parse_args()
    for part in options.parts or PARTS:
        PARTS[part](options.hosts)


if __name__ == "__main__":
    main()

"""What three hosts cost beside three stages in one process: network namespaces, real weights, one sequence.

    python benchmarks/cluster.py [MODEL] [--device cpu] [--delay 1] [--loss 1] [--tokens 40]

Bar: the tokens are those of one process, and the time per token is at most 3 hops of 60 microseconds, and the delay of
three links, longer; where frames are lost only the former. Runs take turns, and the quickest of each counts, since
others only ever make one longer. Hosts have a core each, in turn: let no other process have it meanwhile (``chrt -f``).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from network import Namespaces, netem

import labinfer
from labinfer.cluster.fleet import load
from labinfer.llm import LLM

HOSTS, PROMPT = ("alpha", "beta", "gamma"), [504, 1044, 355, 314]
LIMITS = {"max_model_len": 256, "max_num_seqs": 1}
HOP = 60e-6


def answer(model: LLM, params: labinfer.SamplingParams) -> tuple[list[int], float]:
    """The tokens of one sequence, and seconds between them."""
    [output] = model.generate([PROMPT], params)
    assert output.metrics.inter_token_seconds is not None
    return list(output.token_ids), output.metrics.inter_token_seconds


def layers_of(model: LLM) -> list[int]:
    """How many layers each stage has."""
    return [len(stage.layers) for stage in model.plan.stages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--delay", type=float, help="milliseconds that each link takes", default=0)
    parser.add_argument("--loss", type=float, help="percent of packets that each link loses", default=0)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--turns", type=int, default=40)
    options = parser.parse_args()
    params = labinfer.SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    names = [f"{options.device}:{number}" for number in range(len(HOSTS))]
    hosts = Namespaces(HOSTS, options.device, netem(options.delay, options.loss))
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            labinfer.load(options.model, devices=names, threads=1, **LIMITS) as here,
            load(options.model, hosts.cluster_file(Path(folder) / "cluster.yaml", layers_of(here)), **LIMITS) as there,
        ):
            stages = len(there.plan.stages)
            turns = [(answer(here, params), answer(there, params)) for _ in range(options.turns)]
    finally:
        hosts.close()
    same = all(ours[0] == theirs[0] for ours, theirs in turns)
    one, many = (min(turn[index][1] for turn in turns) for index in range(2))
    bar = stages * (HOP + 1e-3 * options.delay)
    print(f"{stages} stages: {1e3 * one:.3f} ms a token in one process, {1e3 * many:.3f} ms over hosts")
    print(f"overhead {1e6 * (many - one):.0f} µs (bar {1e6 * bar:.0f}), tokens {'identical' if same else 'DIFFERENT'}")
    sys.exit(not same or (not options.loss and many - one > bar))


if __name__ == "__main__":
    main()

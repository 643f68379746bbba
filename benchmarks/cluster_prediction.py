"""Predicted beside measured tokens/s of plans over hosts: network namespaces with a core each, real weights.

    python benchmarks/cluster_prediction.py MODEL.gguf ... [--json FILE]

Bar: within 15 %. The device is profiled first, as is a hop between hosts: two processes over loopback. Plans over two
hosts run one sequence, or several in two micro-batches; those over three, two of which have the same core where there
are but two, run one. All that runs should be at real-time priority (``chrt -f``, ``LABINFER_PATIENCE=0``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from network import Namespaces

import labinfer
from labinfer.cluster.fleet import load
from labinfer.compiler.costs import DeviceProfile, LinkProfile, Measured, StepShape
from labinfer.compiler.costs.plans import predict_plan
from labinfer.compiler.plan import Plan
from labinfer.profile.hops import measure_hop
from labinfer.profile.quiet import Patience
from labinfer.profile.session import profile_device
from labinfer.progress import silent

HOSTS, BAR = ("alpha", "beta", "gamma"), 0.15
PROMPT, OUTPUT, ROUNDS = 16, 96, 5
LIMITS: dict[str, Any] = {"max_num_seqs": 16, "max_model_len": 256, "num_blocks": 256}


@dataclass(frozen=True, slots=True)
class Trial:
    """So many ``sequences`` at once over hosts that have so many ``layers``."""

    layers: tuple[int, ...]
    sequences: int

    def __str__(self) -> str:
        return f"{' + '.join(map(str, self.layers))} layers, {self.sequences} at once"


TRIALS = [
    *(Trial(layers, sequences) for layers in ((10, 20), (15, 15), (20, 10)) for sequences in (1, 8)),
    Trial((15, 15), 16), Trial((10, 10, 10), 1), Trial((6, 8, 16), 1),
]  # fmt: skip
"""Plans for a model of 30 layers."""


def cluster_file(hosts: Namespaces, layers: Sequence[int], hop: LinkProfile, path: Path) -> Path:
    """The cluster file whose first hosts have so many layers, and what was measured of hops."""
    link = f"latency: {1e6 * hop.latency:.1f}us, bandwidth: {hop.bandwidth:.0f}"
    links = [f"  - {{between: [{one}, {other}], {link}}}" for one, other in pairwise(HOSTS)]
    text = hosts.cluster_file(path, layers).read_text()
    path.write_text("\n".join([text, "links:", *links]))
    return path


def predicted(plan: Plan, profile: DeviceProfile, hop: LinkProfile, sequences: int) -> float:
    """Tokens/s: each micro-batch goes through all stages and back to the first, and waits while others are computed."""
    groups = min(sequences, len(plan.stages))
    step = StepShape.decode(sequences // groups, PROMPT + OUTPUT // 2)
    costs = {stage.device: Measured(profile) for stage in plan.stages}
    links = {(one.device, other.device): hop for one, other in pairwise(plan.stages)}
    stages = predict_plan(plan, costs, links, step)
    through = sum(stage.seconds + hop.seconds(stage.nbytes) for stage in stages[:-1]) + stages[-1].seconds + hop.latency
    return sequences / max(through, groups * max(stage.seconds for stage in stages))


def measured(model: labinfer.LLM, sequences: int) -> float:
    """Tokens/s while all sequences make tokens: the median of some rounds."""
    params = labinfer.SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    prompts = [[number + 100] * PROMPT for number in range(sequences)]
    found = []
    for _ in range(ROUNDS):
        outputs = model.generate(prompts, params)
        found.append(sum(1 / (output.metrics.inter_token_seconds or 1) for output in outputs))
    return median(found)


def rows(path: str, hosts: Namespaces, hop: LinkProfile) -> Iterator[dict[str, Any]]:
    """Predicted and measured tokens/s of each plan of a model."""
    profile = profile_device(path, hosts.device, 1, silent, Patience(), quick=True, again=True)
    for trial in TRIALS:
        with tempfile.TemporaryDirectory() as folder:
            file = cluster_file(hosts, trial.layers, hop, Path(folder) / "cluster.yaml")
            with load(path, file, **LIMITS) as model:
                guess, found = predicted(model.plan, profile, hop, trial.sequences), measured(model, trial.sequences)
        yield {"model": Path(path).stem, "plan": str(trial), "predicted": guess, "measured": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    hop, found = measure_hop("sealed"), list[dict[str, Any]]()
    hosts = Namespaces(HOSTS, options.device)
    try:
        for path in options.models:
            for row in rows(path, hosts, hop):
                found.append(row)
                error = row["predicted"] / row["measured"] - 1
                figures = f"predicted {row['predicted']:7.1f} tokens/s, measured {row['measured']:7.1f}, {error:+.1%}"
                print(f"{row['model']}: {row['plan']}: {figures}", flush=True)
    finally:
        hosts.close()
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in found]
    within = sum(error <= BAR for error in errors)
    print(f"{len(found)} plans: median error {median(errors):.1%}, worst {max(errors):.1%}, {within} within {BAR:.0%}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(max(errors) > BAR)


if __name__ == "__main__":
    main()

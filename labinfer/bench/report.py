"""A measurement in words and columns."""

from __future__ import annotations

from typing import Any

from labinfer.units import human_bytes, human_count

COLUMNS = ("test", "tokens/s", "per step", "p99", "read per token", "rate", "of the machine")


def head_lines(found: dict[str, Any]) -> list[str]:
    """The model, its memory and the machine in three lines."""
    machine, planned = found["machine"], found["planned_bytes"]
    parts = " + ".join(f"{name.replace('_', ' ')} {human_bytes(size)}" for name, size in planned.items())
    lines = [
        f"{found['model']} on {', '.join(found['devices'])}: {machine['threads']} threads,"
        f" load average {machine['load_average']:.1f}",
        f"loaded in {found['load_seconds']:.2f} s; peak memory {human_bytes(found['peak_rss_bytes'])} (plan: {parts})",
    ]
    if machine["read_bytes_per_second"]:
        bandwidth, flops = machine["read_bytes_per_second"], machine["float32_flops_per_second"]
        lines.append(f"machine: reads {human_count(bandwidth)}B/s, multiplies float32 at {human_count(flops)}FLOP/s")
    return lines


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The tests as rows under ``COLUMNS``."""
    return [_row(test) for test in found["tests"]]


def _row(test: dict[str, Any]) -> list[str]:
    share = "" if test["share_of_ceiling"] is None else f"{100 * test['share_of_ceiling']:.0f} %"
    head = [test["name"].removesuffix(" x 1"), f"{test['tokens_per_second']:.1f}"]
    if test["kind"] == "prefill":
        ttft = f"{1000 * test['time_to_first_token_seconds']:.1f} ms to the first token"
        return [*head, ttft, "", "", f"{human_count(test['flops_per_second'])}FLOP/s", share]
    p50, p99 = (f"{1000 * test[f'inter_token_{name}_seconds']:.2f} ms" for name in ("p50", "p99"))
    return [
        *head,
        p50,
        p99,
        human_bytes(round(test["bytes_per_token"])),
        f"{human_count(test['bytes_per_second'])}B/s",
        share,
    ]


COMPARE_COLUMNS = ("test", "labinfer", "peer", "ratio", "range")


def compare_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The pairwise comparison with one peer as rows under ``COMPARE_COLUMNS``."""
    return [
        [
            name.removesuffix(" x 1"), f"{test['labinfer']:.1f}", f"{test['peer']:.1f}", f"{test['ratio']:.2f}",
            "{:.2f} - {:.2f}".format(*test["ratio_range"]),
        ]
        for name, test in found.items()
    ]  # fmt: skip

"""The scratch memory that plans reserve is what the kernels use: two formulas, one with numba and one without."""

from __future__ import annotations

import pytest

pytest.importorskip("numba")

from labinfer.backends.cpu import workspace
from labinfer.backends.cpu.attention import Heads, attention_partials_bytes, attention_workspace_bytes
from labinfer.backends.cpu.mla import Latent, mla_workspace_bytes
from labinfer.backends.cpu.moe import Routing, route_workspace_bytes


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "v_dim"), [(9, 3, 64, 64), (32, 8, 128, 96), (7, 1, 20, 20), (64, 1, 8, 40)]
)
def test_attention(heads: int, kv_heads: int, head_dim: int, v_dim: int) -> None:
    described = Heads(heads, kv_heads, head_dim, v_dim, 1.0, 0, 0.0)
    assert workspace.attention_workspace_bytes(heads // kv_heads, head_dim, v_dim) == attention_workspace_bytes(
        described
    )
    assert workspace.attention_partials_bytes(heads, v_dim, 5) == attention_partials_bytes(described, 5)


@pytest.mark.parametrize(("heads", "rope", "rank"), [(16, 64, 512), (3, 8, 20), (128, 64, 512)])
def test_latent_attention(heads: int, rope: int, rank: int) -> None:
    latent = Latent(heads, 16, rope, 16, rank, 1.0, 0)
    assert (
        workspace.mla_scratch(heads, rope, rank)
        >= mla_workspace_bytes(latent)
        > workspace.mla_scratch(heads, rope, rank) - 64
    )


def test_routing() -> None:
    routing = Routing(60, 4, 0, 0, 1.0, 6, 2, 0, 0)
    assert workspace.route_scratch(60, 6) >= route_workspace_bytes(routing) > workspace.route_scratch(60, 6) - 64

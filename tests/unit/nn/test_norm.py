"""Grouped cross-rank batch norm against torch's own on the whole batch, forward and backward."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from kit import ranks
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.schema import DataConfig, ModelConfig
from scaletrain.nn import resnet
from scaletrain.nn.norm import BatchNorm, per_view, pooled, views


def reference(x: Tensor, norm: BatchNorm, group: int) -> Tensor:
    """[V, B, C, ...] by torch's batch norm on each group of each view alone."""
    out = [
        nn.functional.batch_norm(g, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        for v in x
        for g in v.split(group)
    ]
    return torch.cat(out).view_as(x)


def make(group: int = 0) -> BatchNorm:
    norm = BatchNorm(5, group=group).double()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        norm.weight.copy_(0.5 + torch.rand(5, generator=draw))  # type: ignore[union-attr]
        norm.bias.copy_(torch.rand(5, generator=draw))  # type: ignore[union-attr]
    return norm


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("spatial", [(), (4, 3)])
@pytest.mark.parametrize("group", [0, 4, 12])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_process_equals_torch(
    spatial: tuple[int, ...], group: int, channels_last: bool
) -> None:
    x, weight = data((3, 12, 5, *spatial))
    results = []
    for ours in (True, False):
        norm, leaf = make(group), x.clone().requires_grad_()
        if ours:
            flat = leaf.flatten(0, 1)
            if channels_last and spatial:
                flat = flat.contiguous(memory_format=torch.channels_last)
            with views(3):
                y = norm(flat).view_as(x)
        else:
            y = reference(leaf, norm, group or 12)
        (y * weight).sum().backward()
        results.append((y, leaf.grad, norm.weight.grad, norm.bias.grad))  # type: ignore[union-attr]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_running_statistics_move_once_per_view_and_only_on_commit() -> None:
    x, _ = data((3, 12, 5, 4, 3))
    ours, torchs = make(), nn.BatchNorm2d(5).double()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    per_view(ours, x)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    ours.commit()
    for view in x:
        torchs(view)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    assert ours.num_batches_tracked == 3
    after = ours.running_mean.clone()
    pooled(ours, x)
    ours.discard()
    ours.commit()
    assert torch.equal(ours.running_mean, after)


def test_bfloat16_keeps_float32_statistics() -> None:
    x = (torch.randn(64, 8, 6, 6) * 3 + 40).bfloat16()
    norm = BatchNorm(8)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    norm.commit()
    expected = x.float().mean((0, 2, 3)) * 0.1
    assert norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-4)


def test_a_group_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_group=5"):
        make(5)(torch.zeros(12, 5, dtype=torch.float64))


# --- several ranks --------------------------------------------------------------------------------


def on_ranks(cases: tuple[tuple[int, tuple[int, ...]], ...]) -> dict[str, Tensor]:
    """Each case: (group, rows of every rank). Returns y, dx, the averaged parameter gradients and
    running statistics.
    """
    found: dict[str, Tensor] = {}
    for case, (group, rows) in enumerate(cases):
        x, weight = data((2, sum(rows), 5, 4))
        own = slice(sum(rows[: dist.rank()]), sum(rows[: dist.rank() + 1]))
        norm, leaf = make(group), x[:, own].clone().requires_grad_()
        y = per_view(norm, leaf)
        (y * weight[:, own]).sum().backward()
        norm.commit()
        found |= {f"{case}/y": y.detach(), f"{case}/dx": leaf.grad}  # type: ignore[dict-item]
        found |= {
            f"{case}/dw": dist.sum_nograd(norm.weight.grad),
            f"{case}/db": dist.sum_nograd(norm.bias.grad),
        }  # type: ignore[union-attr,arg-type]
        found |= {f"{case}/mean": norm.running_mean, f"{case}/var": norm.running_var}
    return found


def test_ranks_equal_one_big_batch_also_with_unequal_slices(tmp_path: Path) -> None:
    # groups inside a rank, one group over two ranks, the whole batch, and a last batch that ranks
    # share unequally
    cases = ((2, (4, 4, 4, 4)), (8, (4, 4, 4, 4)), (0, (4, 4, 4, 4)), (0, (5, 3, 1, 4)))
    results = ranks.run(4, on_ranks, tmp_path, cases)
    for case, (group, rows) in enumerate(cases):
        x, weight = data((2, sum(rows), 5, 4))
        norm, leaf = make(), x.clone().requires_grad_()
        y = reference(leaf, norm, group or sum(rows))
        (y * weight).sum().backward()
        for key, whole in (("y", y), ("dx", leaf.grad)):
            got = torch.cat([r[f"{case}/{key}"] for r in results], dim=1)
            torch.testing.assert_close(got, whole, rtol=1e-11, atol=1e-11, msg=f"case {case} {key}")
        for key, whole in (("dw", norm.weight.grad), ("db", norm.bias.grad)):  # type: ignore[union-attr]
            torch.testing.assert_close(results[0][f"{case}/{key}"], whole, rtol=1e-11, atol=1e-11)
        for key in ("mean", "var"):
            assert all(
                torch.equal(r[f"{case}/{key}"], results[0][f"{case}/{key}"]) for r in results
            ), f"case {case} {key}"
        if not group:
            torchs = nn.BatchNorm1d(5).double()
            for view in x:
                torchs(view)
            torch.testing.assert_close(results[0][f"{case}/mean"], torchs.running_mean)
            torch.testing.assert_close(results[0][f"{case}/var"], torchs.running_var)


def test_compiled_backbone_has_no_graph_break_and_stages_its_statistics() -> None:
    """With all that a network may have before its first layer and between its kernels' pixels."""
    from torch._dynamo.utils import counters

    config = ModelConfig(name="resnet18", width=0.125, input="lightness", output_stride=8)
    net = resnet.ResNet(config, DataConfig())
    x = torch.randn(2, 4, 3, 16, 16)
    plain = per_view(net, x)
    staged = net.bn1.staged[0][0].clone()
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.discard()
    counters.clear()
    compiled = torch.compile(net, backend="aot_eager", dynamic=False)
    y = per_view(compiled, x)
    y.sum().backward()
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.bn1.staged[0][0], staged)
    assert sum(counters["graph_break"].values()) == 0
    assert net.conv1.weight.grad is not None
    torch._dynamo.reset()


def collectives(group: int) -> dict[str, Tensor]:
    """Sums over ranks in a forward and in a backward of four views through one layer."""
    x, _ = data((4, 4, 5, 4))
    norm, leaf = make(group), x[:, dist.rank() * 2 : dist.rank() * 2 + 2].clone().requires_grad_()
    with mock.patch.object(dist, "sum_nograd", wraps=dist.sum_nograd) as summed:
        y = per_view(norm, leaf)
        forward = summed.call_count
        y.square().sum().backward()
    return {"calls": torch.tensor([forward, summed.call_count - forward])}


@pytest.mark.parametrize(("group", "calls"), [(0, [1, 1]), (2, [0, 0])])
def test_all_views_share_one_collective_a_direction(
    group: int, calls: list[int], tmp_path: Path
) -> None:
    for result in ranks.run(2, collectives, tmp_path, group):
        assert result["calls"].tolist() == calls


def pooled_on_ranks(group: int) -> dict[str, Tensor]:
    x, weight = data((2, 8, 5, 4))
    own = slice(dist.rank() * 8 // dist.world(), (dist.rank() + 1) * 8 // dist.world())
    norm, leaf = make(group), x[:, own].clone().requires_grad_()
    y = pooled(norm, leaf)
    (y * weight[:, own]).sum().backward()
    return {"y": y.detach(), "dx": leaf.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("group", [2, 4])
def test_a_pooled_group_is_its_samples_with_all_their_views(group: int, tmp_path: Path) -> None:
    x, weight = data((2, 8, 5, 4))
    norm, leaf = make(), x.clone().requires_grad_()
    y = torch.cat(
        [
            reference(g.flatten(0, 1)[None], norm, 2 * group).view_as(g)
            for g in leaf.split(group, 1)
        ],
        1,
    )
    (y * weight).sum().backward()
    results = ranks.run(4, pooled_on_ranks, tmp_path, group)
    torch.testing.assert_close(torch.cat([r["y"] for r in results], 1), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        torch.cat([r["dx"] for r in results], 1), leaf.grad, rtol=1e-11, atol=1e-11
    )

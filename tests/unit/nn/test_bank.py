"""Queue, bank and number: what micro-batches stage is written as one; and ShuffleBN against batch
norm of permuted groups.
"""

from __future__ import annotations

import pytest
import torch
from kit import ranks
from torch import Tensor, nn

from scaletrain import dist, rng
from scaletrain.nn.bank import Bank, Once, Queue
from scaletrain.nn.norm import BatchNorm, shuffled

B, D = 24, 3  # global batch; 24 = 4 ranks x 2 micro-batches x 3 samples


def rows(step: int) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(step))


def index(step: int) -> Tensor:
    """A sample three times in a batch of 24."""
    found = torch.randperm(40, generator=torch.Generator().manual_seed(step))[:B]
    found[[5, 14, 20]] = found[0].item()
    return found


def memories(parts: int) -> dict[str, Tensor]:
    """Three steps on this rank's slices, each in so many micro-batches with two pushes."""
    queue, bank, once = Queue(2 * B + 7, D), Bank(40, D, noise=4), Once()
    for step in range(3):
        mine, others, which = (
            dist.mine(x).chunk(parts) for x in (rows(step), rows(10 + step), index(step))
        )
        for a, b, i in zip(mine, others, which, strict=True):
            queue.push(a)
            queue.push(b)
            bank.stage(i, a)
            once(torch.tensor(1.0 + step))
        for module in (queue, bank, once):
            module.commit(parts)
    return {"queue": queue.rows, f"bank@{bank.start}": bank.rows, "once": once.value}


def permuted() -> dict[str, Tensor]:
    x = torch.arange(B * 2.0).view(B, 2)
    order = rng.permutation(B, 5)
    there = dist.permute_nograd(dist.mine(x), order)
    return {
        "there": dist.gather_nograd(there),
        "back": dist.gather_nograd(dist.permute_nograd(there, order.argsort())),
    }


def unequal() -> dict[str, Tensor]:
    """Writes of the last batch of a pass, of which the later ranks have fewer rows, or none."""
    bank = Bank(40, D)
    mine = slice(dist.rank() * 6, max(dist.rank() * 6, min(dist.rank() * 6 + 6, 15)))
    bank.write(index(0)[mine], rows(0)[mine])
    return {f"unequal@{bank.start}": bank.rows}


def work() -> dict[str, Tensor]:
    return {
        **unequal(),
        **{f"{parts}/{k}": v for parts in (1, 2) for k, v in memories(parts).items()},
        **permuted(),
    }


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return ranks.run(4, work, tmp_path_factory.mktemp("memories"))


def expected() -> tuple[Tensor, Tensor]:
    ring, bank = torch.zeros(2 * B + 7, D), Bank(40, D, noise=4).rows.clone()
    pushed = torch.cat([x for step in range(3) for x in (rows(step), rows(10 + step))])
    for place, row in enumerate(pushed):
        ring[place % len(ring)] = row
    for step in range(3):
        for i, row in zip(index(step), rows(step), strict=True):
            bank[i] = row
    return ring, bank


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_micro_batches_leave_what_the_whole_batch_leaves(parts: int) -> None:
    found, (ring, bank) = memories(parts), expected()
    assert torch.equal(found["queue"], ring)
    assert torch.equal(found["bank@0"], bank)
    assert found["once"] == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_ranks_leave_what_one_process_leaves(parts: int, spread: list[dict[str, Tensor]]) -> None:
    ring, bank = expected()
    assert all(torch.equal(result[f"{parts}/queue"], ring) for result in spread)
    pieces = [v for result in spread for k, v in result.items() if k.startswith(f"{parts}/bank@")]
    assert torch.equal(torch.cat(pieces), bank)


def test_ranks_write_as_many_rows_as_they_have(spread: list[dict[str, Tensor]]) -> None:
    expected = torch.zeros(40, D)
    for i, row in zip(index(0)[:15], rows(0)[:15], strict=True):
        expected[i] = row
    found = [result[f"unequal@{10 * rank}"] for rank, result in enumerate(spread)]
    assert torch.equal(torch.cat(found), expected)


def test_a_permutation_over_ranks_goes_there_and_back(spread: list[dict[str, Tensor]]) -> None:
    x = torch.arange(B * 2.0).view(B, 2)
    for result in (*spread, permuted()):
        assert torch.equal(result["there"], x[rng.permutation(B, 5)])
        assert torch.equal(result["back"], x)


def test_a_batch_larger_than_the_queue_leaves_its_last_rows() -> None:
    queue = Queue(5, D)
    for step in range(2):
        queue.push(rows(step))
        queue.commit()
    assert {tuple(r) for r in queue.rows.tolist()} == {tuple(r) for r in rows(1)[-5:].tolist()}
    assert queue.age(B).item() == pytest.approx(5 / B)


def test_what_is_discarded_leaves_no_trace() -> None:
    for module, stage in (
        (queue := Queue(5, D), lambda: queue.push(rows(0))),
        (bank := Bank(40, D), lambda: bank.stage(index(0), rows(0))),
        (once := Once(), lambda: once(torch.tensor(2.0))),
    ):
        before = {k: v.clone() for k, v in module.state_dict().items()}
        stage()
        module.discard()
        module.commit()
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_shuffled_groups_are_those_of_the_permutation() -> None:
    """Two views, groups of six, each normalised by torch; every sample comes back to its place."""
    x = torch.randn(2, B, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    norm = BatchNorm(D, group=6).double()
    got = shuffled(norm, x, 7, 2)
    order = rng.permutation(B, "shuffle", 7, 2)
    assert sorted(order.tolist()) == list(range(B))
    want = torch.empty_like(x)
    for view in range(2):
        for group in order.split(6):
            want[view, group] = nn.functional.batch_norm(x[view, group], None, None, training=True)
    torch.testing.assert_close(got, want)
    assert not torch.equal(order, rng.permutation(B, "shuffle", 7, 3))
    assert not torch.allclose(shuffled(norm, x, 7, 3), want)


def test_noise_depends_on_the_sample_alone() -> None:
    whole, other = Bank(40, D, noise=4).rows, Bank(41, D, noise=4).rows
    assert torch.equal(whole, other[:40])
    assert not torch.equal(whole, Bank(40, D, noise=5).rows)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(40))

"""The stand-ins for torch-scatter and torch-sparse: the real ones' values and gradients, and an error for the rest."""

from __future__ import annotations

import itertools
import pickle
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch_geometric.typing
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import stand_ins as extensions

STAND_INS = extensions.stand_ins()
OURS = SimpleNamespace(**STAND_INS.host_names())
REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "add": sum,
    "mean": lambda values: sum(values) / len(values),
    "min": min,
    "max": max,
}
INDEX = torch.tensor([3, 0, 3, 5, 0, 3, 1])  # unsorted; nothing has 2 or 4


@pytest.fixture(scope="module", params=["stand-ins", pytest.param("real", marks=pytest.mark.slow)])
def given(request: pytest.FixtureRequest) -> SimpleNamespace:
    """What is claimed of the stand-ins is so of the real packages, which are compiled if they are not there."""
    return OURS if request.param == "stand-ins" else SimpleNamespace(**extensions.real().host_names())


def whole_numbers(*shape: int) -> Tensor:
    """Floats whose sums have no rounding."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()


def by_hand(values: Tensor, index: Tensor, dim: int, size: int, reduce: str) -> Tensor:
    """A loop over every number, in plain Python."""
    shape = list(values.shape)
    shape[dim] = size
    groups: dict[tuple[int, ...], list[float]] = {}
    for place in itertools.product(*(range(length) for length in values.shape)):
        at = list(place)
        at[dim] = int(index[place[dim]] if index.dim() == 1 else index[place[: index.dim()]])
        groups.setdefault(tuple(at), []).append(values[place].item())
    result = torch.zeros(shape, dtype=values.dtype)
    for at, group in groups.items():
        result[at] = REDUCTIONS[reduce](group)
    return result


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scatter_is_the_loop_over_every_number(given, reduce, dim):
    values = whole_numbers(4, 7, 3).movedim(1, dim)
    expected = by_hand(values, INDEX, dim, 6, reduce)
    torch.testing.assert_close(given.scatter(values, INDEX, dim, dim_size=6, reduce=reduce), expected, rtol=0, atol=0)
    # With one more row than the largest index, and with as many as that.
    more = by_hand(values, INDEX, dim, 7, reduce)
    torch.testing.assert_close(given.scatter(values, INDEX, dim, dim_size=7, reduce=reduce), more, rtol=0, atol=0)
    torch.testing.assert_close(given.scatter(values, INDEX, dim, reduce=reduce), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_scatter_keeps_the_type(given, reduce, dtype):
    values = 2 * whole_numbers(6).to(dtype)
    reduced = given.scatter(values, torch.tensor([0, 0, 2, 2, 2, 2]), dim=0, reduce=reduce)
    assert reduced.dtype == dtype
    first, last = values[:2].tolist(), values[2:].tolist()
    expected = [REDUCTIONS[reduce](first), 0, REDUCTIONS[reduce](last)]
    if dtype == torch.int64:
        expected = [value // 1 for value in expected]
    assert reduced.tolist() == expected


def test_an_index_may_have_the_first_dimensions_of_the_values(given):
    values, index = whole_numbers(2, 7, 3), torch.stack((INDEX, INDEX.flip(0)))
    for reduce in REDUCTIONS:
        expected = by_hand(values, index, 1, 6, reduce)
        torch.testing.assert_close(given.scatter(values, index, 1, dim_size=6, reduce=reduce), expected, rtol=0, atol=0)


def test_broadcast_repeats_an_index_along_the_other_dimensions(given):
    other = torch.empty(2, 3, 4)
    for dim in (0, 1, 2, -1):
        index = torch.arange(other.shape[dim])
        viewed = given.broadcast(index, other, dim)
        assert viewed.shape == other.shape
        for place in itertools.product(range(2), range(3), range(4)):
            assert viewed[place] == place[dim]
    leading = torch.arange(6).view(2, 3)
    assert torch.equal(given.broadcast(leading, other, 1), leading[:, :, None].expand(2, 3, 4))


def test_gradients_are_derivatives(given):
    values = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, 3, 3, 7])
    for reduce in REDUCTIONS:
        assert gradcheck(lambda x, reduce=reduce: given.scatter(x, INDEX, 0, dim_size=6, reduce=reduce), values)
        assert gradcheck(lambda x, reduce=reduce: given.segment_csr(x, ends, reduce=reduce), values)
    for reduce in ("sum", "mean"):  # and twice, as conservative forces need
        assert gradgradcheck(
            lambda x, reduce=reduce: given.scatter(x, INDEX, 0, dim_size=6, reduce=reduce) ** 2, values
        )


def test_of_equal_values_the_first_has_the_gradient_of_an_extreme(given):
    values = torch.tensor([2.0, 1.0, 1.0, 5.0, 5.0], requires_grad=True)
    index = torch.tensor([0, 0, 0, 2, 2])
    for reduce, first in (("min", [0, 1, 0, 1, 0]), ("max", [1, 0, 0, 1, 0])):
        (gradient,) = torch.autograd.grad(given.scatter(values, index, 0, dim_size=4, reduce=reduce).sum(), values)
        assert gradient.tolist() == first


def test_nothing_is_reduced_to_zeros(given):
    nothing, none = torch.empty(0, 3, requires_grad=True), torch.empty(0, dtype=torch.long)
    for reduce in REDUCTIONS:
        assert given.scatter(nothing, none, 0, reduce=reduce).shape == (0, 3)
        for reduced in (
            given.scatter(nothing, none, 0, dim_size=2, reduce=reduce),
            given.segment_coo(nothing, none, dim_size=2, reduce=reduce),
            given.segment_csr(nothing, torch.zeros(3, dtype=torch.long), reduce=reduce),
        ):
            assert torch.equal(reduced, torch.zeros(2, 3))


def test_segments_are_runs_of_rows(given):
    values = whole_numbers(7, 2)
    index, ends = torch.tensor([0, 0, 1, 3, 3, 3, 4]), torch.tensor([0, 2, 3, 3, 6, 7])
    for reduce in REDUCTIONS:
        expected = by_hand(values, index, 0, 5, reduce)
        assert torch.equal(given.segment_coo(values, index, dim_size=5, reduce=reduce), expected)
        assert torch.equal(given.segment_csr(values, ends, reduce=reduce), expected)
    counts = torch.ones(1, dtype=torch.long).expand(7)
    assert given.segment_coo(counts, index, dim_size=6).tolist() == [2, 1, 0, 3, 1, 0]
    assert given.segment_csr(counts, torch.tensor([2, 3, 5])).tolist() == [1, 2]  # the others are in no run
    both = torch.stack((index, index))
    assert torch.equal(given.segment_coo(torch.stack((values, values)), both)[1], by_hand(values, index, 0, 5, "sum"))


def test_picked_rows_are_the_edges_of_the_atoms(given):
    generator = torch.Generator().manual_seed(0)
    target, source = torch.randint(5, (2, 30), generator=generator)  # with some edges twice
    number = torch.arange(30)
    rows = given.SparseTensor(row=target, col=source, value=number, sparse_sizes=(6, 5))[target]
    assert rows.sparse_sizes() == (30, 5)
    entries = list(zip(*(part.tolist() for part in rows.coo()), strict=True))
    pairs = itertools.product(range(30), range(30))
    met = [(edge, int(source[other]), other) for edge, other in pairs if target[other] == target[edge]]
    assert sorted(entries) == sorted(met)
    assert [entry[:2] for entry in entries] == sorted(entry[:2] for entry in met)  # of equal edges either may be first
    assert [part.tolist() for part in rows.coo()] == [part().tolist() for part in (
        rows.storage.row, rows.storage.col, rows.storage.value
    )]  # fmt: skip
    counted = rows.set_value(None).sum(dim=1)
    assert counted.dtype == torch.float32
    assert counted.tolist() == [int((target == target[edge]).sum()) for edge in range(30)]
    assert rows.storage.value() is not None
    rows.set_value_(-rows.storage.value(), layout="coo")
    of_last = [-other for edge, _, other in entries if edge == 29]
    assert rows[torch.tensor([29, 29])].storage.value().tolist() == 2 * of_last


def test_a_matrix_without_entries_has_empty_rows(given):
    none = torch.empty(0, dtype=torch.long)
    rows = given.SparseTensor(row=none, col=none, value=none, sparse_sizes=(3, 3))[torch.tensor([2, 0])]
    assert [part.tolist() for part in rows.coo()] == [[], [], []]
    assert rows.set_value(None).sum(dim=1).tolist() == [0, 0]


def test_a_sparse_tensor_is_copied_and_pickled(monkeypatch):
    # Under the name that the stand-in has where it is installed.
    monkeypatch.setitem(sys.modules, "torch_sparse", STAND_INS.torch_sparse)
    one = OURS.SparseTensor(row=torch.tensor([1, 0]), col=torch.tensor([0, 1]), value=INDEX[:2], sparse_sizes=(2, 2))
    assert [part.tolist() for part in pickle.loads(pickle.dumps(one)).coo()] == [part.tolist() for part in one.coo()]


MATRIX = OURS.SparseTensor(row=INDEX, col=INDEX, value=INDEX, sparse_sizes=(6, 6))
ONES = torch.ones(7)


@pytest.mark.parametrize(
    ("ask", "package"),
    [
        (lambda: STAND_INS.torch_scatter.scatter_softmax, "torch-scatter"),
        (lambda: STAND_INS.torch_sparse.SparseStorage, "torch-sparse"),
        (lambda: OURS.SparseTensor.from_edge_index, "torch-sparse"),
        (lambda: MATRIX.t(), "torch-sparse"),
        (lambda: MATRIX.storage.rowptr(), "torch-sparse"),
        (lambda: MATRIX[:2], "torch-sparse"),
        (lambda: MATRIX[INDEX, INDEX], "torch-sparse"),
        (lambda: MATRIX.sum(dim=1), "torch-sparse"),
        (lambda: MATRIX.set_value(INDEX, layout="csc"), "torch-sparse"),
        (lambda: OURS.SparseTensor(rowptr=INDEX, col=INDEX), "torch-sparse"),
        (lambda: OURS.scatter(ONES, INDEX, out=torch.zeros(6)), "torch-scatter"),
        (lambda: OURS.scatter(ONES, INDEX, reduce="mul"), "torch-scatter"),
        (lambda: OURS.segment_csr(ONES[None], INDEX[None]), "torch-scatter"),
    ],
)
def test_what_a_stand_in_lacks_it_says_and_names_the_real_package(ask, package):
    with pytest.raises((ImportError, AttributeError, NotImplementedError), match="stand-in") as raised:
        ask()
    assert f"stand-in for {package} that is installed here" in str(raised.value)
    assert f"{package}==" in str(raised.value)


def test_an_import_of_what_is_missing_says_so_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_scatter", STAND_INS.torch_scatter)
    with pytest.raises(ImportError, match=r"torch_scatter.scatter_max is not in the stand-in"):
        from torch_scatter import scatter_max  # noqa: F401


def test_torch_geometric_takes_torch_sparse_as_missing_where_it_is_a_stand_in():
    stand_in = extensions.installed().torch_sparse.__version__.endswith("+standin")
    assert torch_geometric.typing.WITH_TORCH_SCATTER
    assert stand_in != torch_geometric.typing.WITH_TORCH_SPARSE


class _Asked(TorchDispatchMode):
    """Notes every number that Python asks a tensor for; on a GPU each of them waits for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave")
        return function(*args, **(kwargs or {}))


def test_reductions_wait_for_the_device_only_where_no_size_is_given():
    values = torch.randn(7, 2, requires_grad=True)
    with _Asked() as asked:
        for reduce in REDUCTIONS:
            OURS.scatter(values, INDEX, 0, dim_size=6, reduce=reduce).sum().backward()
            OURS.segment_coo(values, INDEX, dim_size=6, reduce=reduce)
            OURS.segment_csr(values, torch.tensor([0, 3, 7]), reduce=reduce)
        assert asked.count == 0
        OURS.scatter(values, INDEX, 0)
        assert asked.count == 1
        # Whether its entries are sorted, and how many entries the picked rows have, the real package asks as well.
        OURS.SparseTensor(row=INDEX, col=INDEX, value=INDEX, sparse_sizes=(6, 6))[INDEX]
        assert asked.count == 3

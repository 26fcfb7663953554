"""An optimizer's state after a teleport: trajectories where it is exact, the state itself where it is not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import DIAGONAL, FIRST_ORDER, OPTIMIZERS
from symmetry_cases import Problem, case, relative
from torch import Tensor, nn

import metateleport as mt
from metateleport.optim import AtSteps
from metateleport.optim.state import cannot_carry, points_on_the_way
from metateleport.point import Point
from metateleport.symmetries import BatchPair2022
from metateleport.teleporters import Move, travel

WARM, STEPS = 6, 25
DIAGONAL_CASES = ["rescaling", "rescaling, convolutions", "chain of rescalings", "norm gains", "gated"]
LINEAR_CASES = [
    "linear pair without bias",
    "linear pair",
    "chain of linear pairs",
    "attention, one projection",
    "low-rank adapter",
    "linear chain",
    "quadratic",
    "translations",
]
KEYS_WITH_BIAS = {"attention, one projection", "translations"}
# Where every parameter is a matrix, Muon has nothing but momentum.
MATRICES = {"linear pair without bias", "rescaling without bias"}


class Pushing(mt.Teleporter):
    name = "pushing"

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given

    def generator(self, symmetry: mt.Symmetry, point: Point, state: object) -> tuple[Tensor, object]:
        return self.given, state


def batches(problem: Problem) -> Iterator[tuple[Tensor, ...]]:
    """Minibatches that differ, so that a mean of squares is not the square of a mean."""
    source = torch.Generator().manual_seed(5)
    while True:
        if problem.targets:
            noise = [torch.randn(each.shape, generator=source, dtype=each.dtype) for each in problem.inputs]
            yield tuple(each + 0.5 * other for each, other in zip(problem.inputs, noise, strict=True))
        else:
            # The symmetries of a quadratic are those of its matrix, which has to stay up to a factor.
            yield (problem.inputs[0] * (0.5 + torch.rand((), generator=source, dtype=torch.float64)),)


def weights(problem: Problem) -> Tensor:
    return torch.cat([value.detach().flatten() for value in problem.model.parameters()])


def set_rate(optimizer: torch.optim.Optimizer, rates: list[float]) -> list[float]:
    before = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return before


def follow(problem: Problem, optimizer: torch.optim.Optimizer, still: int = WARM) -> list[Tensor]:
    """Trains with other batches at every step, the first steps at a step size of zero: only the state moves then."""
    data = batches(problem)
    rates = set_rate(optimizer, [0.0] * len(optimizer.param_groups)) if still else []
    trajectory = []
    for step in range(WARM + STEPS):
        if step == still and still:
            set_rate(optimizer, rates)
        optimizer.zero_grad()
        problem.loss_of(problem.model(*next(data))).backward()
        optimizer.step()
        if step >= WARM:
            trajectory.append(weights(problem))
    return trajectory


def moved_problem(name: str, teleporter: mt.Teleporter) -> Problem:
    """The problem at the other end of the teleport."""
    problem = case(name).problem()
    point, _, _ = travel(teleporter, problem.point(), problem.symmetries)
    problem.model.load_state_dict({key: value.detach() for key, value in point.parameters.items()}, strict=False)
    return problem


def wrapped(
    problem: Problem, optimizer: str, teleporter: mt.Teleporter, at: int = WARM, **settings: object
) -> mt.TeleportingOptimizer:
    inner = OPTIMIZERS[optimizer](problem.model, 1.0)
    schedule = AtSteps([at])
    return mt.TeleportingOptimizer(inner, problem.model, teleporter, problem.symmetries, schedule=schedule, **settings)  # type: ignore[arg-type]


def random_element() -> mt.Teleporter:
    return mt.RandomTeleporter(size=0.7, seed=2)


# --- exact: state gathered in one gauge and transported is state gathered in the other -----------------------------


EXACT = [(name, inner) for name in DIAGONAL_CASES for inner in (*FIRST_ORDER, *DIAGONAL)] + [
    (name, inner)
    for name in LINEAR_CASES
    for inner in FIRST_ORDER
    # The bias of the keys has a gradient of rounding alone, of which Lion takes the sign.
    if (inner != "muon" or name in MATRICES) and (inner != "lion" or name not in KEYS_WITH_BIAS)
]


def gap_between_gauges(name: str, inner: str, state: str) -> tuple[float, mt.TeleportReport]:
    """Largest relative difference of the trajectory that teleports from that which was in the gauge all along."""
    problem = case(name).problem()
    optimizer = wrapped(problem, inner, random_element(), state=state)
    mine = follow(problem, optimizer)
    other = moved_problem(name, random_element())
    theirs = follow(other, OPTIMIZERS[inner](other.model, 1.0))
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    start = weights(moved_problem(name, random_element()))
    # On the scale of the way that was gone, so that small steps do not hide a difference.
    way = max(float((each - start).norm()) for each in theirs)
    assert way > 0
    return max(float((a - b).norm()) for a, b in zip(mine, theirs, strict=True)) / way, optimizer.last_report


@pytest.mark.parametrize(("name", "inner"), EXACT)
def test_transported_state_is_that_of_the_other_gauge(name: str, inner: str) -> None:
    gap, report = gap_between_gauges(name, inner, "transport")
    assert gap < 1e-6
    assert report.state == "transport"
    assert set(report.state_entries.values()) <= {"exact"}
    assert bool(report.state_entries) is (inner != "sgd")


@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("inner", [each for each in (*FIRST_ORDER, *DIAGONAL) if each not in {"sgd", "muon"}])
def test_state_that_is_not_transported_goes_elsewhere(inner: str, state: str) -> None:
    gap, report = gap_between_gauges("rescaling", inner, state)
    assert gap > 1e-3
    assert set(report.state_entries.values()) == {"kept" if state == "keep" else "reset"}


# --- equivariant optimizers: teleported in mid-course, the trajectory is the image of the one that never was ---------


def rotation(kind: str) -> Tensor:
    """A generator of a 4x4 rotation: any, or one that permutes coordinates up to their signs."""
    if kind == "signed permutation":
        turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64) * (math.pi / 2)
        return torch.block_diag(turn, turn)[[0, 2, 1, 3]][:, [0, 2, 1, 3]]
    drawn = torch.randn(4, 4, dtype=torch.float64)
    return (drawn - drawn.mT) / 2


def images(name: str, generator: Tensor, trajectory: list[Tensor]) -> list[Tensor]:
    problem = case(name).problem()
    element = torch.linalg.matrix_exp(generator)
    moved = []
    for each in trajectory:
        torch.nn.utils.vector_to_parameters(each.clone(), problem.model.parameters())
        point = problem.symmetries[0].act(element, problem.point())
        moved.append(torch.cat([point.parameters[key].flatten() for key, _ in problem.model.named_parameters()]))
    return moved


EQUIVARIANT = [("rotation", each, 1e-9) for each in ("sgd", "momentum", "nesterov")]
EQUIVARIANT += [("signed permutation", each, 1e-9) for each in ("sgd", "momentum", "nesterov", "lion", *DIAGONAL)]
# Muon works in bfloat16.
EQUIVARIANT += [(kind, "muon", 0.1) for kind in ("rotation", "signed permutation")]


@pytest.mark.parametrize(("kind", "inner", "tolerance"), EQUIVARIANT)
def test_a_teleported_trajectory_is_the_image_of_the_other(kind: str, inner: str, tolerance: float) -> None:
    name = "linear pair without bias"
    generator = rotation(kind)
    gaps = {}
    for state in ("transport", "keep"):
        problem, other = case(name).problem(), case(name).problem()
        optimizer = wrapped(problem, inner, Pushing(generator), state=state)
        mine = follow(problem, optimizer, still=0)
        theirs = images(name, generator, follow(other, OPTIMIZERS[inner](other.model, 1.0), still=0))
        assert optimizer.last_report is not None
        assert optimizer.last_report.size > 0
        way = float((theirs[-1] - theirs[0]).norm())
        gaps[state] = max(float((a - b).norm()) for a, b in zip(mine, theirs, strict=True)) / way
    assert gaps["transport"] < tolerance
    assert inner == "sgd" or gaps["keep"] > max(1e-3, 2 * gaps["transport"])


# --- not exact: what is said of each entry, and what becomes of it ------------------------------------------------


def entries_of(name: str, inner: str, state: str = "transport") -> tuple[mt.TeleportReport, dict[str, Tensor], dict]:
    """The report, and the state of a moved weight before and after the teleport."""
    problem = case(name).problem()
    optimizer = wrapped(problem, inner, random_element(), state=state, at=4)
    moved = problem.symmetries[0].parameters[0]
    weight = dict(problem.model.named_parameters())[moved]
    seen: list[dict] = []
    rates = set_rate(optimizer, [0.0] * len(optimizer.param_groups))
    assert len(rates) == len(optimizer.param_groups)

    def look(*_: object) -> None:
        state = optimizer.state.get(weight, {})
        seen.append({key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()})

    data = batches(problem)
    for step in range(5):
        optimizer.zero_grad()
        problem.loss_of(problem.model(*next(data))).backward()
        if step == 4:
            look()
            optimizer.optimizer.register_step_pre_hook(look)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert optimizer.last_report is not None
    return optimizer.last_report, seen[0], seen[1]


@pytest.mark.parametrize(
    ("name", "inner", "told"),
    [
        ("linear pair", "adam", {"exp_avg": "exact", "exp_avg_sq": "approximate"}),
        ("linear pair", "adagrad", {"sum": "approximate"}),
        (
            "linear pair",
            "adamw, amsgrad",
            {"exp_avg": "exact", "exp_avg_sq": "approximate", "max_exp_avg_sq": "approximate"},
        ),
        (
            "linear pair",
            "rmsprop, centred, momentum",
            {"square_avg": "approximate", "momentum_buffer": "approximate", "grad_avg": "exact"},
        ),
        (
            "translations",
            "rmsprop, centred, momentum",
            {"square_avg": "approximate", "momentum_buffer": "approximate", "grad_avg": "exact"},
        ),
        ("2022 form", "momentum", {"momentum_buffer": "approximate"}),
        ("linear pair", "muon", {"momentum_buffer": "exact", "exp_avg": "exact", "exp_avg_sq": "approximate"}),
        ("translations", "muon", {"momentum_buffer": "kept", "exp_avg": "exact", "exp_avg_sq": "kept"}),
        ("linear pair without bias", "soap", {"exp_avg": "exact", "exp_avg_sq": "kept", "GG": "kept", "Q": "kept"}),
        ("linear pair", "lbfgs", None),
        (
            "rescaling without bias",
            "shampoo",
            dict.fromkeys(("momentum_buffer", "pre_cond_0", "inv_pre_cond_0", "pre_cond_1", "inv_pre_cond_1"), "kept"),
        ),
    ],
)
def test_the_report_says_what_became_of_each_entry(name: str, inner: str, told: dict[str, str] | None) -> None:
    if inner == "lbfgs":
        problem = case(name).problem()
        optimizer = wrapped(problem, inner, random_element(), at=2)
        for _ in range(3):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = problem.loss_of(problem.model(*problem.inputs))
                loss.backward()
                return loss

            optimizer.step(closure)
        assert optimizer.last_report is not None
        assert set(optimizer.last_report.state_entries.values()) == {"reset"}
        assert "old_dirs" in optimizer.last_report.state_entries
        return
    report, _, _ = entries_of(name, inner)
    assert dict(report.state_entries) == told
    assert report.state == "approximate"


@pytest.mark.parametrize("inner", ["shampoo", "soap"])
def test_preconditioners_are_kept_or_reset_and_warned_of_once(inner: str) -> None:
    _, before, after = entries_of("linear pair without bias", inner)
    keys = ("pre_cond_0", "inv_pre_cond_0", "momentum_buffer") if inner == "shampoo" else ("exp_avg_sq",)
    for key in keys:
        assert torch.equal(before[key], after[key])
    report, before, after = entries_of("linear pair without bias", inner, state="reset")
    assert set(before)
    assert not after
    assert report.state == "reset"
    problem = case("linear pair without bias").problem()
    optimizer = mt.TeleportingOptimizer(
        OPTIMIZERS[inner](problem.model, 1.0), problem.model, random_element(), problem.symmetries, every=2
    )
    with pytest.warns(UserWarning, match="not known to be made of gradients") as caught:
        follow(problem, optimizer, still=0)
    said = [str(each.message) for each in caught if "not known" in str(each.message)]
    assert len(said) == len(set(said)) == (5 if inner == "shampoo" else 3)


def test_squares_under_a_full_matrix_are_those_of_uncorrelated_gradients() -> None:
    """Means of squares of drawn gradients: carried, they are the means of the squares of the carried gradients."""
    problem = case("linear pair without bias").problem()
    (symmetry,) = problem.symmetries
    element = symmetry.group.random(size=0.7, seed=1, dtype=torch.float64)
    point = problem.point()
    deviations = {name: torch.rand_like(point.parameters[name]) + 0.5 for name in symmetry.parameters}
    carry: Callable[..., mt.symmetries.base.Carried] = symmetry.carry_covectors
    draws = []
    for _ in range(4000):
        drawn = {name: value * torch.randn_like(value) for name, value in deviations.items()}
        draws.append({name: value.square() for name, value in carry(element, drawn, point).tensors.items()})
    carried = symmetry.carry_squares(element, {n: v.square() for n, v in deviations.items()}, point)
    assert not carried.exact
    for name, value in carried.tensors.items():
        assert relative(torch.stack([each[name] for each in draws]).mean(0), value) < 0.1


def test_points_on_the_way_are_made_for_actions_that_read_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case("linear pair").problem()
    (symmetry,) = problem.symmetries
    start = problem.point()
    size, refused = torch.tensor(1.0), torch.tensor(False)
    elements = [symmetry.group.random(seed=seed, dtype=torch.float64) for seed in range(2)]
    moves = [Move(symmetry, element, size, refused, size) for element in elements]
    for reads, there in ((False, start), (True, symmetry.act(elements[0], start))):
        monkeypatch.setattr(type(symmetry), "reads_place", reads)
        first, second = points_on_the_way(moves, start)
        for name in symmetry.parameters:
            assert torch.equal(first.parameters[name], start.parameters[name])
            assert torch.equal(second.parameters[name], there.parameters[name])


def test_a_teleport_that_moves_nothing_leaves_the_state_alone() -> None:
    problem = case("linear pair").problem()
    optimizer = wrapped(problem, "adam", mt.NoTeleport(), at=2)
    follow(problem, optimizer)
    assert optimizer.last_report is not None
    assert optimizer.last_report.state_entries == {}


# --- weights that an optimizer keeps -----------------------------------------------------------------------------


class Shadow(torch.optim.SGD):
    """Keeps a mean of the weights under a name that nobody knows."""

    def step(self, closure: Any = None) -> Any:
        for parameter in (value for group in self.param_groups for value in group["params"]):
            kept = self.state[parameter]
            kept.setdefault("shadow", parameter.detach().clone()).lerp_(parameter.detach(), 0.1)
        return super().step(closure)


def _lookahead(model: nn.Module) -> torch.optim.Optimizer:
    library = pytest.importorskip("pytorch_optimizer")
    return library.Lookahead(torch.optim.Adam(model.parameters(), lr=1e-2), k=3)  # type: ignore[no-any-return]


KEEPING = {
    "shadow": (lambda model: Shadow(model.parameters(), lr=1e-2), "shadow"),
    "lookahead": (_lookahead, "slow_params"),
}


@pytest.mark.parametrize("keeping", KEEPING)
@pytest.mark.parametrize("how", ["transport", "keep", "reset"])
@pytest.mark.parametrize("kind", ["rescaling", "linear pair"])
def test_weights_in_the_state_move_as_weights_do(keeping: str, how: str, kind: str) -> None:
    torch.manual_seed(0)
    between = nn.ReLU() if kind == "rescaling" else nn.Identity()
    model = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3)).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    make, key = KEEPING[keeping]
    inner = make(model)
    optimizer = mt.TeleportingOptimizer(
        inner, model, mt.RandomTeleporter(size=1.0, seed=0), schedule=AtSteps([7]), state=how
    )

    def outputs() -> Tensor:
        # Between the two: kept weights that stay behind would be on another orbit's place.
        kept = {name: inner.state[value][key].lerp(value.detach(), 0.5) for name, value in model.named_parameters()}
        return torch.func.functional_call(model, kept, (x,)).detach()

    seen: list[Tensor] = []
    inner.register_step_pre_hook(lambda *_: seen.append(outputs()) if optimizer.steps == 7 else None)
    for step in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        before = outputs() if step == 7 else None
        optimizer.step()
    report = optimizer.last_report
    assert report is not None
    assert report.accepted
    assert report.size > 0
    assert report.state_entries[key] == "exact"
    assert before is not None
    assert relative(seen[0], before) < 1e-10


def test_weights_in_the_state_are_not_left_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    for make, keywords, said in (
        (Shadow, {"symmetries": [BatchPair2022(model, "0", "2", nn.LeakyReLU(0.1))]}, "exact symmetries only"),
        (pytest.importorskip("pytorch_optimizer").ScheduleFreeAdamW, {}, "schedule-free"),
    ):
        inner = make(model.parameters(), lr=1e-3)
        optimizer = mt.TeleportingOptimizer(
            inner, model, mt.RandomTeleporter(size=0.1, seed=0), schedule=AtSteps([3]), **keywords
        )
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert optimizer.last_report is not None
        assert not optimizer.last_report.accepted
        assert said in optimizer.last_report.reason
        assert type(inner).__name__ in optimizer.last_report.reason


@pytest.mark.parametrize(("size", "is_weights"), [(1.0, True), (0.01, False), (100.0, False)])
def test_a_momentum_that_is_parallel_to_the_weights_is_no_copy_of_them(size: float, is_weights: bool) -> None:
    class Own(torch.optim.SGD):
        """Keeps a multiple of the weights, as a momentum is on a loss that pulls them to zero."""

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = Own(model.parameters(), lr=0.1)
    for value in model.parameters():
        optimizer.state[value]["kept"] = size * value.detach()
    assert bool(cannot_carry(optimizer, dict(model.named_parameters()), None)) == is_weights

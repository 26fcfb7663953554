"""The judges of the contract: an optimizer that breaks it in one place is found wrong there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from . import loops
from .cells import CHECKPOINTS, SERVES_ALL, Cell, _serves, judge
from .loops import _reference
from .stand_in import ADAMW, StandIn
from .table import Table

Step = Callable[..., Any]


class _WithoutFactor(StandIn):
    def step(self, closure: Any = None, loss: Any = None) -> Any:
        kept = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 1.0
        value = super().step(closure, loss)
        for group, lr in zip(self.param_groups, kept, strict=True):
            group["lr"] = lr
        return value


class _Uncounted(StandIn):
    skipped = property(lambda _: 0, lambda *_: None)  # type: ignore[assignment]


class _NotANumber(StandIn):
    def step(self, closure: Any = None, loss: Any = None) -> Any:
        value = super().step(closure, loss)
        if self.skipped:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))
        return value


class _Forgetful(StandIn):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class _LostInCopies(StandIn):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": {}}


class _Deaf(StandIn):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not self.param_groups:
            super().add_param_group(param_group)


class _Elsewhere(StandIn):
    def step(self, closure: Any = None, loss: Any = None) -> Any:
        value = super().step(closure, loss)
        for group in self.param_groups:
            for each in group["params"]:
                each.data = each.data.clone()
        return value


class _Drawing(StandIn):
    def step(self, closure: Any = None, loss: Any = None) -> Any:
        if loss is not None:
            torch.rand(1)
        return super().step(closure, loss)


class _Still(StandIn):
    def step(self, closure: Any = None, loss: Any = None) -> Any:
        return closure() if closure else loss


class _Uphill(StandIn):
    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        for group in self.param_groups:
            group["maximize"] = True


class _Coupled(StandIn):
    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = False


class _OfTheLastPass(StandIn):
    """Steps by the number of samples in the model's last pass, as whoever trusts a hook does."""

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.rows = 0
        if isinstance(model, nn.Module):
            model.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.rows = len(inputs[0])

    def step(self, closure: Any = None, loss: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = self.rows / loops.ROWS
        return super().step(closure, loss)


class _Fallback(StandIn):
    def __init__(self, *given: Any, **settings: Any) -> None:
        raise KeyError("weight")


BROKEN: dict[type[StandIn], str] = {
    _WithoutFactor: "scheduler that ends at zero",
    _Uncounted: "NaN in a batch",
    _NotANumber: "infinite gradient",
    _Forgetful: "state dict midway",
    _LostInCopies: "pickle midway",
    _Deaf: "group added later",
    _Elsewhere: "parameters in one flat buffer",
    _Drawing: "dropout",
    _Still: "step()",
    _Uphill: "step()",
    _Coupled: "weight decay",
    _OfTheLastPass: "validation before the step",
    _Fallback: "step()",
}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    for each in (_reference, _serves):
        each.cache_clear()
    yield
    for each in (_reference, _serves):
        each.cache_clear()


@pytest.mark.parametrize("broken", BROKEN, ids=lambda kind: kind.__name__)
def test_what_breaks_the_contract_is_wrong(broken: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "StandIn", broken)
    verdict = judge(Cell(BROKEN[broken], "mlp", ADAMW))
    assert verdict.kind == "wrong", verdict


def test_accumulated_steps_may_not_be_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer by the number of passes since the last step."""

    class Counting(_OfTheLastPass):
        def _see(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
            self.rows += loops.ROWS if torch.is_grad_enabled() else 0

        def step(self, closure: Any = None, loss: Any = None) -> Any:
            value, self.rows = super().step(closure, loss), 0
            return value

    monkeypatch.setattr(loops, "StandIn", Counting)
    verdict = judge(Cell("accumulation", "mlp", ADAMW))
    assert "times that of one pass" in verdict.why, verdict


def _refusing(error: Exception, late: bool = False) -> Step:
    """A learned optimizer that raises an error from a line of the library."""
    from metateleport import files

    source = compile("def refuse(error):\n    raise error\n", files.__file__, "exec")
    names: dict[str, Any] = {}
    exec(source, names)

    class Refusing(StandIn):
        def __init__(self, what: Any, checkpoint: Any, **settings: Any) -> None:
            super().__init__(what, **settings)
            if not late:
                names["refuse"](error)

        def step(self, closure: Any = None, loss: Any = None) -> Any:
            super().step(closure, loss)
            names["refuse"](error)

    return Refusing


SENTENCE = "this checkpoint has no network for any symmetry of the model: use 'digits'"


@pytest.mark.parametrize(
    ("name", "error", "late", "kind"),
    [
        ("leaky_mlp", ValueError(SENTENCE), False, "refused"),
        ("digits", ValueError(SENTENCE), False, "wrong"),
        ("leaky_mlp", ValueError(SENTENCE), True, "wrong"),
        ("leaky_mlp", KeyError(SENTENCE), False, "wrong"),
        ("leaky_mlp", ValueError("no"), False, "wrong"),
        ("leaky_mlp", RuntimeError(SENTENCE), False, "wrong"),
    ],
)
def test_refusals(name: str, error: Exception, late: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence of the library's before anything has moved, and not of the checkpoint that serves all."""
    monkeypatch.setattr(loops.mt, "LearnedOptimizer", _refusing(error, late))
    assert judge(Cell("step()", "mlp", name)).kind == kind


def test_an_error_from_elsewhere_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: Any, **__: Any) -> Any:
        raise ValueError(SENTENCE)

    monkeypatch.setattr(loops.mt, "LearnedOptimizer", elsewhere)
    assert "not the library's own" in judge(Cell("step()", "mlp", "leaky_mlp")).why


def test_the_table_counts_refusals_of_the_perceptron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.mt, "LearnedOptimizer", _refusing(ValueError(SENTENCE)))
    others = [name for name in CHECKPOINTS if name not in SERVES_ALL]
    for count, wrong in ((2, False), (3, True)):
        table = Table([Cell("step()", "mlp", name) for name in others[:count]])
        rows = list(table.rows())
        assert rows[-1].split()[-1] == "r" * count
        assert table.wrong == wrong
        assert any(SENTENCE in line for line in table.footer())

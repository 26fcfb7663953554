"""The recorder of passes: which pass, every run of a module, checkpointing, compiled and wrapped models, copies."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from metateleport.capture import PassRecorder, point_of, tensors_in, unseen


class Net(nn.Module):
    """A layer, a block that may run twice and under activation checkpointing, and a head."""

    def __init__(self, reentrant: bool | None = None, twice: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.reentrant, self.twice = reentrant, twice
        self.first = nn.Linear(3, 3)
        self.body = nn.Sequential(
            nn.Linear(3, 5), nn.LeakyReLU(0.1, inplace=True), nn.Dropout(dropout), nn.Linear(5, 4)
        )
        self.head = nn.Linear(4, 2)

    def encode(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.encode(h)
        return self.head(y + self.encode(h[:3] * 0.5).mean(0) if self.twice else y)


MODULES = ("body.0", "body.3", "head")


def build(**keywords: Any) -> Net:
    torch.manual_seed(0)
    return Net(**keywords).double()


def batch(samples: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_gradients(model: nn.Module, recorder: PassRecorder, modules: tuple[str, ...] = MODULES) -> None:
    """The product of cotangents and activations is the gradient of each weight."""
    assert recorder.last is not None
    seen, sent = recorder.activations(recorder.last), recorder.cotangents(recorder.last)
    for name in modules:
        gradient = model.get_submodule(name).weight.grad
        assert gradient is not None
        assert bool(gradient.any())
        assert torch.allclose(sent[name].mT @ seen[name], gradient.to(sent[name].dtype), rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("replays", [False, True])
def test_what_was_recorded_gives_the_gradients(
    reentrant: bool | None, twice: bool, dropout: float, replays: bool
) -> None:
    model = build(reentrant=reentrant, twice=twice, dropout=dropout)
    recorder = PassRecorder(model, MODULES, replays=replays)
    model(batch()).square().sum().backward()
    assert (recorder.passes, recorder.reached) == (1, 1)
    assert recorder.last is not None
    assert recorder.last.repeated == ({"body.0", "body.3"} if twice else set())
    assert recorder.last.connected == set(MODULES)
    assert_gradients(model, recorder)


def test_a_run_that_the_loss_does_not_depend_on_counts_zeros() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer(2 * x[:2])

    model = Twice().double()
    recorder = PassRecorder(model, ["layer"])
    model(batch())[0].square().sum().backward()
    assert recorder.last is not None
    sent = recorder.cotangents(recorder.last)["layer"]
    assert sent.shape == (8, 2)
    assert not bool(sent[6:].any())
    assert_gradients(model, recorder, ("layer",))


@pytest.mark.parametrize(("reentrant", "stops"), [(False, True), (False, False), (True, True)])
def test_a_whole_model_under_checkpointing_is_one_pass(reentrant: bool, stops: bool) -> None:
    model = build()
    recorder = PassRecorder(model, MODULES)
    # Without an early stop the recomputation runs to its end.
    with set_checkpoint_early_stop(stops):
        checkpoint(model, batch().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    assert (recorder.passes, recorder.reached) == (1, 1)
    assert_gradients(model, recorder)


@pytest.mark.parametrize("without", [True, False])
def test_a_pass_after_the_backward_pass_takes_no_ones_place(without: bool) -> None:
    model = build()
    recorder = PassRecorder(model, MODULES)
    model(batch()).square().sum().backward()
    model.eval()
    with torch.set_grad_enabled(not without):
        kept = model(batch(2))
    model.train()
    assert (recorder.passes, recorder.reached) == (1 if without else 2, 1)
    assert recorder.last is not None
    assert recorder.last.training
    assert_gradients(model, recorder)
    del kept


def test_a_pass_before_the_training_pass_does_not_either() -> None:
    model = build()
    recorder = PassRecorder(model, MODULES)
    model(batch(2))
    assert recorder.last is not None
    assert not recorder.last.reached
    model(batch()).square().sum().backward()
    assert_gradients(model, recorder)


def test_trials_and_repetitions_are_not_seen() -> None:
    model = build()
    recorder, other = PassRecorder(model, MODULES), PassRecorder(model, ())
    with unseen():
        model(batch(2)).sum().backward()
    model.zero_grad()
    point_of(model, [], (batch(),), None, lambda out: out.square().sum())
    recorded = recorder.evaluate((batch(),), {})
    recorder.outputs_at(recorded, dict(model.named_parameters()), lambda out: out.sum()).backward()
    assert recorder.passes == other.passes == recorder.reached == other.reached == 0


def test_transforms_of_functions_are_not_seen() -> None:
    model = build()
    recorder = PassRecorder(model, MODULES)
    model(batch()).square().sum().backward()
    named = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(named, batch())
    assert each["head.weight"].shape == (6, 2, 4)
    assert recorder.passes == recorder.reached == 1
    assert_gradients(model, recorder)


def test_passes_that_no_backward_pass_reached_are_let_go() -> None:
    model = build()
    recorder = PassRecorder(model, MODULES)
    out = model(batch())
    first = weakref.ref(recorder.last)
    out.sum().backward()
    del out
    recorder.clear()
    gc.collect()
    assert first() is None
    model(batch()).sum().backward()
    later = model(batch(9))
    inputs = [weakref.ref(recorder.last)]
    assert recorder.last is not None
    assert recorder.last.outputs[0].shape[0] == 6
    del later
    assert inputs[0]() is not None


def test_a_backward_pass_after_clearing_changes_nothing() -> None:
    model = build()
    recorder = PassRecorder(model, MODULES)
    out = model(batch())
    recorder.clear()
    out.sum().backward()
    assert recorder.last is None
    assert recorder.reached == 0


def test_without_replays_nothing_is_copied() -> None:
    model = build()
    recorder = PassRecorder(model, MODULES, replays=False)
    model(batch()).sum().backward()
    last = recorder.last
    assert last is not None
    assert not last.outputs
    assert not last.random
    assert not last.buffers
    assert not last.positional
    assert not last.output_cotangents
    recorder.wanted = False
    recorder.clear()
    model(batch()).sum().backward()
    assert recorder.last is None


def test_what_is_renewed_is_forgotten_when_the_next_pass_begins_and_not_before() -> None:
    model = build()
    recorder = PassRecorder(model, MODULES)
    model(batch()).sum().backward()
    recorder.renew()
    # A closure that runs nothing leaves what there was.
    assert (recorder.passes, recorder.reached) == (1, 1)
    model.zero_grad()
    for seed in (1, 2):
        model(batch(seed=seed)).sum().backward()
    assert (recorder.passes, recorder.reached) == (2, 2)
    recorder.renew()
    recorder.clear()
    for seed in (1, 2):
        model(batch(seed=seed)).sum().backward()
    assert recorder.reached == 2


def test_accumulation_is_counted() -> None:
    model = build()
    recorder = PassRecorder(model, MODULES)
    for seed in range(3):
        model(batch(seed=seed)).sum().backward()
    assert (recorder.passes, recorder.reached) == (3, 3)


def test_integers_and_half_precision() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, index: Tensor) -> dict[str, Tensor]:
            return {"out": self.layer(self.words(index))}

    model = Words().to(torch.bfloat16)
    recorder = PassRecorder(model, ["words", "layer"])
    model(torch.randint(10, (3, 5)))["out"].float().square().sum().backward()
    assert recorder.last is not None
    seen, sent = recorder.activations(recorder.last), recorder.cotangents(recorder.last)
    assert seen["words"].dtype == torch.int64
    assert seen["words"].shape == (15, 1)
    assert sent["words"].shape == (15, 4)
    assert seen["layer"].dtype == sent["layer"].dtype == sent["words"].dtype == torch.float32


def test_autocast_is_seen_in_the_weights_dtype() -> None:
    model = build().float()
    recorder = PassRecorder(model, MODULES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch().float())
    out.float().square().sum().backward()
    assert recorder.last is not None
    assert {value.dtype for value in recorder.activations(recorder.last).values()} == {torch.float32}
    assert {value.dtype for value in recorder.cotangents(recorder.last).values()} == {torch.float32}
    again = recorder.replay(recorder.last, dict(model.named_parameters()))
    assert torch.equal(again[0], recorder.last.outputs[0])


@dataclasses.dataclass
class Output:
    """As transformers return it."""

    logits: Tensor
    states: tuple[Tensor, ...] = ()


@pytest.mark.parametrize("wrap", [lambda out: out, lambda out: (out, 3), lambda out: {"a": [out]}, Output])
def test_outputs_of_any_kind(wrap: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.net(x))

    model = Wrapped()
    recorder = PassRecorder(model, ["net.head"])
    out = model(batch())
    recorder_out = recorder.last
    assert recorder_out is not None
    first = tensors_in(out)[0]
    first.square().sum().backward()
    assert torch.allclose(recorder_out.output_cotangents[0], 2 * first)
    assert_gradients(model, recorder, ("net.head",))


def test_a_model_that_writes_its_input_is_repeated_from_what_it_was_given() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.mul_(2).sub_(0.5))

    model = Writing()
    recorder = PassRecorder(model, ["net.head"])
    x = batch()
    out = model(x.clone())
    assert recorder.last is not None
    assert torch.equal(recorder.replay(recorder.last, dict(model.named_parameters()))[0], out)
    assert torch.equal(recorder.replay(recorder.last, dict(model.named_parameters()))[0], out)
    kept = x.clone()
    assert torch.equal(recorder.evaluate((x,), {}).outputs[0], out)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("names", ["inside", "outside"])
def test_wrapped_models(names: str) -> None:
    inner = build()
    model = nn.DataParallel(inner)
    modules = tuple(f"module.{name}" if names == "outside" else name for name in MODULES)
    recorder = PassRecorder(model, modules)
    out = model(batch())
    out.square().sum().backward()
    assert not recorder.silent
    assert_gradients(model if names == "outside" else inner, recorder, modules)
    assert recorder.last is not None
    assert torch.equal(recorder.replay(recorder.last, dict(recorder.model.named_parameters()))[0], out)


@pytest.mark.parametrize("first", ["recorder", "compiled call"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_says_so_and_goes_on(first: str, backend: str, how: str) -> None:
    torch._dynamo.reset()
    model: Any = build()
    inner = model
    if how == "wrapped":
        model = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=True)
    if first == "compiled call":
        model(batch())
    recorder = PassRecorder(model, ["first", "head"])
    out = model(batch())
    out.square().sum().backward()
    assert "compiled" in recorder.silent
    if how == "wrapped":
        # The wrapper's own hooks run: the pass can be repeated as it was written.
        assert (recorder.passes, recorder.reached) == (1, 1)
        assert recorder.last is not None
        assert torch.allclose(recorder.complete(recorder.last)[0], out)
        assert torch.equal(recorder.activations(recorder.last)["head"], inner.body(inner.first(batch())))
        assert not PassRecorder(model, ()).silent


def test_copies_and_files_carry_hooks_that_do_nothing() -> None:
    model = build()
    recorders = [PassRecorder(model, MODULES) for _ in range(2)]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(batch()).sum().backward()
    assert [each.passes for each in recorders] == [0, 0]
    model(batch()).sum().backward()
    assert [each.reached for each in recorders] == [1, 1]
    recorders[0].close()
    model(batch()).sum().backward()
    assert [each.passes for each in recorders] == [0, 2]


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(KeyError, match="no module named 'tail'"):
        PassRecorder(build(), ["tail"])

"""Trainers of other libraries run the two optimizers as they run AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import pairwise
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import metateleport as mt

Make = Callable[[nn.Module], torch.optim.Optimizer]


def _told(model: nn.Module) -> dict[str, Any]:
    first = next((name for name, _ in model.named_modules() if name.endswith("first")), None)
    # The layers of `Net`, wherever a trainer has put it; a transformer's symmetries are found.
    if first is None:
        return {"example_input": {"input_ids": _Texts().batch()["input_ids"][:2]}}
    return {"symmetries": [mt.Rescaling(model, first, first.replace("first", "second"))]}


def _teleporting(model: nn.Module) -> torch.optim.Optimizer:
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return mt.TeleportingOptimizer(inner, model, mt.RandomTeleporter(size=0.3, seed=0), every=3, **_told(model))


def _learned(model: nn.Module) -> torch.optim.Optimizer:
    """It notes whether a step has moved along a symmetry: where teleports are small, symmetries rest in between."""
    optimizer = mt.LearnedOptimizer(model, "digits", **_told(model))
    optimizer.teleported = False

    def look(stepped: Any, *_: Any) -> None:
        stepped.teleported |= bool(stepped.last_step.moves)

    optimizer.register_step_post_hook(look)
    return optimizer


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "learned": _learned,
    "learned, parameters only": lambda model: mt.LearnedOptimizer(model.parameters(), "digits"),
    "teleporting": _teleporting,
}


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Make:
    return OPTIMIZERS[request.param]


class Net(nn.Module):
    """A perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def _data(rows: int = 96) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    return x, (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(2))).argmax(1)


def _loader() -> DataLoader[Any]:
    """Batches of 16 and a smaller last one."""
    return DataLoader(TensorDataset(*_data(90)), batch_size=16)


def _loss_of(model: nn.Module) -> float:
    x, y = _data()
    model.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def _teleported(optimizer: Any) -> bool:
    """Whether the pass was seen from which a teleport starts; True for an optimizer that makes none."""
    if isinstance(optimizer, mt.TeleportingOptimizer):
        return any(each.size > 0 for each in optimizer.reports)
    return getattr(optimizer, "teleported", True)


# accelerate


def _accelerator(**settings: Any) -> Any:
    """A new one; what the last one said of precision would hold for the process."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **settings)


def _by_accelerate(make: Make, settings: dict[str, Any], _: Path) -> None:
    accelerator = _accelerator(**settings)
    accumulated = settings.get("gradient_accumulation_steps", 1)
    model = Net()
    start = _loss_of(model)
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step / 100))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, _loader(), scheduler)
    for _ in range(8 * accumulated):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert _loss_of(accelerator.unwrap_model(model)) < 0.8 * start
    # Of several passes none agrees with their gradients.
    assert accumulated > 1 or _teleported(optimizer.optimizer)


def test_accelerate_saves_and_goes_on(make: Make, tmp_path: Path) -> None:
    """`save_state` and `load_state` midway change nothing."""

    def run(saved: bool) -> list[Tensor]:
        accelerator = _accelerator()
        torch.manual_seed(0)
        model = Net()
        model, optimizer, loader = accelerator.prepare(model, make(model), _loader())
        for epoch in range(4):
            if saved and epoch == 2:
                accelerator.save_state(str(tmp_path))
                with torch.no_grad():
                    for value in model.parameters():
                        value.add_(1.0)
                accelerator.load_state(str(tmp_path))
            for x, y in loader:
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        return [value.detach().clone() for value in accelerator.unwrap_model(model).parameters()]

    for ours, theirs in zip(run(saved=True), run(saved=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Lightning


def _by_lightning(make: Make, settings: dict[str, Any], _: Path) -> None:
    """It hands every step a closure; one that does nothing where steps are taken by hand."""
    automatic = not settings.get("by hand")
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, number: int) -> Any:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def configure_optimizers(self) -> Any:
            return make(self.net)

    module = Module()
    start = _loss_of(module.net)
    trainer = lightning.Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(settings if automatic else {}),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, _loader())
    assert _loss_of(module.net) < 0.8 * start
    assert "accumulate_grad_batches" in settings or _teleported(trainer.optimizers[0])


# transformers


class _Texts(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards."""

    def __len__(self) -> int:
        return 64

    def batch(self) -> dict[str, Tensor]:
        """All of them."""
        rows = [self[number] for number in range(len(self))]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = (torch.arange(8) + number) % 11
        return {"input_ids": tokens, "labels": tokens}


def _by_transformers(make: Make, settings: dict[str, Any], folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        num_train_epochs=8 * settings.get("gradient_accumulation_steps", 1),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    batch = _Texts().batch()

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            return float(model(**batch).loss)

    start = loss()
    trainer = transformers.Trainer(model, arguments, train_dataset=_Texts(), optimizers=(make(model), None))
    trainer.train()
    assert loss() < 0.9 * start


def test_transformers_goes_on_from_a_checkpoint(make: Make, tmp_path: Path) -> None:
    """The Trainer's own checkpoint, read by a new one, leads where an uninterrupted run does."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "embd_pdrop": 0.0}
    config = transformers.GPT2Config(**shape, resid_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)

    def run(folder: Path, resumed: str | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=16,
            num_train_epochs=3,
            use_cpu=True,
            report_to=[],
            save_strategy="epoch",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=_Texts(), optimizers=(make(model), None))
        trainer.train(resume_from_checkpoint=resumed)
        return [value.detach().clone() for value in model.parameters()]

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    for ours, theirs in zip(resumed, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# What every trainer does


TRAINERS: dict[str, tuple[Callable[[Make, dict[str, Any], Path], None], dict[str, dict[str, Any]]]] = {
    "accelerate": (
        _by_accelerate,
        {
            "plain": {},
            "bf16": {"mixed_precision": "bf16"},
            "accumulated": {"gradient_accumulation_steps": 3},
            "accumulated bf16": {"mixed_precision": "bf16", "gradient_accumulation_steps": 3},
        },
    ),
    "lightning": (
        _by_lightning,
        {
            "plain": {},
            "bf16": {"precision": "bf16-mixed"},
            "clipped": {"gradient_clip_val": 10.0},
            "accumulated": {"accumulate_grad_batches": 2},
            "by hand": {"by hand": True},
        },
    ),
    "transformers": (
        _by_transformers,
        {
            "plain": {},
            "accumulated": {"gradient_accumulation_steps": 2},
            "bf16": {"bf16": True},
            "checkpointed": {"activation_checkpointing": True},
        },
    ),
}
"""How each trains, and with which settings."""


def _design() -> list[tuple[str, str, str]]:
    """Each optimizer meets each trainer, and each of a trainer's settings is met; which of them goes round."""
    places = range(max(len(settings) for _, settings in TRAINERS.values()))
    rows = []
    for optimizer, trainer, place in pairwise(list(OPTIMIZERS), list(TRAINERS), places):
        names = list(TRAINERS[trainer][1])
        rows.append((optimizer, trainer, names[place % len(names)]))
    return list(dict.fromkeys(rows))


@pytest.mark.parametrize(("optimizer", "trainer", "setting"), _design())
def test_a_trainer_trains(optimizer: str, trainer: str, setting: str, tmp_path: Path) -> None:
    train, settings = TRAINERS[trainer]
    train(OPTIMIZERS[optimizer], settings[setting], tmp_path)


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("trainer", "setting"), [(t, name) for t, (_, held) in TRAINERS.items() for name in held])
def test_a_trainer_trains_with_every_setting(optimizer: str, trainer: str, setting: str, tmp_path: Path) -> None:
    train, settings = TRAINERS[trainer]
    train(OPTIMIZERS[optimizer], settings[setting], tmp_path)

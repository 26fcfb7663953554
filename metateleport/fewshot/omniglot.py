"""Omniglot through learn2learn's own loader."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from metateleport.fewshot.learn2learn import learn2learn

__all__ = ["omniglot"]


def omniglot(root: str | Path, download: bool = False) -> tuple[Any, list[int]]:
    """Omniglot's background and evaluation sets together: 1623 characters of 50 alphabets, 20 images of each.

    Args:
        root: the folder that holds `omniglot-py`, or that it is downloaded into.
        download: whether to download missing data.

    Returns:
        The `learn2learn.vision.datasets.FullOmniglot`, whose images are PIL's, and the character of every image, from
        the names of the files alone.

    Raises:
        MissingLearn2Learn: if learn2learn is not installed.
        FileNotFoundError: if the data are missing and cannot be downloaded.

    Source: Lake, Salakhutdinov and Tenenbaum, Science 2015; joined as in Ravi and Larochelle, ICLR 2017.
    """
    loader = learn2learn().vision.datasets.FullOmniglot
    folder = Path(root) / "omniglot-py"
    how = (
        f"{folder} has to hold images_background.zip and images_evaluation.zip of github.com/brendenlake/omniglot and "
        "what is in them, as torchvision.datasets.Omniglot leaves them"
    )
    try:
        data = loader(root=str(root), download=download)
    except (RuntimeError, OSError) as error:
        if download:
            raise FileNotFoundError(
                f"Omniglot could not be fetched into {root} ({type(error).__name__}: {error}). Without a network, {how}"
            ) from error
        raise FileNotFoundError(
            f"there is no Omniglot in {root}: fetch it with download=true where there is a network, or name another "
            f"folder with root=; {how}"
        ) from error
    # Numbered through both parts, as the loader numbers them; opening the images for it would take minutes.
    parts = [[character for _, character in part._flat_character_images] for part in data.dataset.datasets]
    first = len(data.dataset.datasets[0]._characters)
    return data, list(itertools.chain(parts[0], (first + character for character in parts[1])))

"""Puts the gallery and the shipped checkpoints, which lie beside the package, into it when a wheel is made."""

from setuptools import find_packages, setup

BESIDE = {"metateleport._gallery": "tasks", "metateleport._checkpoints": "checkpoints"}

setup(
    packages=[*find_packages(include=["metateleport", "metateleport.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "metateleport": ["py.typed"],
        "metateleport._checkpoints": ["**/*"],
        "metateleport._gallery": ["backbones/*"],
    },
)

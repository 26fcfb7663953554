"""A torchvision made for CUDA beside a torch made for CPUs: seen, and mended in the environment.

pip may give the two together. torchvision's compiled extension then does not load, and `import torchvision` ends with
`operator torchvision::nms does not exist`; so do transformers, PEFT and learn2learn, which import it where it is
installed. What is missing are two operators, which nothing of theirs calls on a CPU.

    python -m metateleport.torchvision

looks whether torchvision imports, and if it fails in this way, writes two small files into the environment that define
the operators whenever torchvision is imported. `make venv` runs it.
"""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

__all__ = ["HOOK", "define_operators", "main", "mend"]

HOOK = "_torchvision_operators"
"""Name of the two files that `mend` writes, without their suffixes."""


_KEPT: list[Any] = []
"""Libraries with definitions, which last as long as they do."""


def define_operators() -> None:
    """Defines the operators that torchvision registers fakes for, if its own extension does not load."""
    import contextlib
    import importlib.util
    from pathlib import Path

    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    for extension in Path(found.origin).parent.glob("_C.*"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(extension))
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


class _Finder:
    """Defines the operators just before torchvision's own code runs; otherwise it finds nothing."""

    @staticmethod
    def find_spec(name: str, path: Any = None, _: Any = None) -> Any:
        # Nothing may be imported before this: an import would come here again.
        if name != "torchvision":
            return None
        import importlib.machinery

        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def prepared(module: Any) -> None:
                define_operators()
                execute(module)

            loader.exec_module = prepared
        return spec


def mend(site: Path) -> None:
    """Writes the hook into a `site-packages`: a module, and a line that every start of Python runs.

    The hook does not need metateleport, costs a start less than a millisecond, and leaves a torchvision whose extension
    loads as it is.

    Args:
        site: the folder.

    Raises:
        OSError: if it cannot be written.
    """
    source = "\n".join(
        [
            '"""Written by `python -m metateleport.torchvision`, which says why; delete it with the .pth beside it."""',
            "",
            "from __future__ import annotations",
            "",
            "import sys\n\n_KEPT: list[Any] = []\n\n",
            inspect.getsource(define_operators),
            "",
            inspect.getsource(_Finder),
            "",
            "sys.meta_path.insert(0, _Finder)",
        ]
    )
    (site / f"{HOOK}.py").write_text(source + "\n", encoding="utf-8")
    (site / f"{HOOK}.pth").write_text(f"import {HOOK}\n", encoding="utf-8")


def main() -> int:
    """Looks whether torchvision imports, and mends the environment if it does not.

    Returns:
        0 if torchvision imports in the end or is not installed, else 1.
    """
    if importlib.util.find_spec("torchvision") is None:
        print("torchvision is not installed: nothing to mend")
        return 0
    said = _import()
    if said is None:
        print("torchvision imports: nothing to mend")
        return 0
    if "torchvision::nms does not exist" not in said:
        print(f"torchvision does not import, and not for want of its operators:\n{said}", file=sys.stderr)
        return 1
    site = Path(sysconfig.get_paths()["purelib"])
    mend(site)
    still = _import()
    if still is not None:
        for suffix in (".py", ".pth"):
            (site / f"{HOOK}{suffix}").unlink()
        print(f"torchvision does not import, even with its operators defined:\n{still}", file=sys.stderr)
        return 1
    print(f"torchvision was made for CUDA and torch for CPUs: {site / HOOK}.py defines the operators that it misses")
    return 0


def _import() -> str | None:
    """What `import torchvision` ends with in a process of its own; None if it works."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


if __name__ == "__main__":
    raise SystemExit(main())

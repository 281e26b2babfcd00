"""Fabric's strategies of training in many processes; a file of its own, since Lightning is imported when it is used."""

from __future__ import annotations

from typing import Any

from lightning_fabric.strategies import DDPStrategy

__all__ = ["Averaging"]


class Averaging(DDPStrategy):
    """DDP's launcher, process group and placement, without its wrapper, which needs hooks in one `forward`.

    Gradients may come from a compiled step or from an estimator that calls backward itself; `Processes` averages them.
    """

    def setup_module(self, module: Any) -> Any:
        """The module as it is."""
        return module

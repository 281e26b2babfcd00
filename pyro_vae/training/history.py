"""What a run has been through, epoch by epoch."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.training.steps import Step

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["History"]

COLUMNS = ("epoch", "step", "beta", "loss", "elbo", "rate", "distortion", "valid_elbo", "seconds")
_AVERAGED = ("loss", "elbo", "rate", "distortion")


class History:
    """Rows of finished epochs, and the sums of the running one."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        self.started = time.perf_counter()

    def add(self, step: Step) -> None:
        """Take a step of the running epoch into account."""
        for name in _AVERAGED:
            self.sums[name] = self.sums.get(name, 0.0) + getattr(step, name) * step.num_data
        self.sums["num_data"] = self.sums.get("num_data", 0) + step.num_data
        self.last = step

    def close_epoch(self, valid_elbo: float | None) -> None:
        """Make a row of the running epoch."""
        row: dict[str, Any] = {name: self.sums[name] / self.sums["num_data"] for name in _AVERAGED}
        row |= {"epoch": self.last.epoch, "step": self.last.step, "beta": self.last.beta}
        row |= {"valid_elbo": valid_elbo, "seconds": self._seconds()}
        self.rows.append({name: row[name] for name in COLUMNS})
        self.sums, self.started = {}, time.perf_counter()

    def _seconds(self) -> float:
        return self.sums.get("seconds", 0.0) + time.perf_counter() - self.started

    def frame(self) -> pd.DataFrame:
        """The finished epochs as a table."""
        import pandas as pd

        frame = pd.DataFrame(self.rows, columns=list(COLUMNS))
        return frame.astype({name: float for name in COLUMNS if name not in ("epoch", "step")})

    def write(self, path: Path) -> None:
        """Write the finished epochs as a table of comma-separated values, with nothing where there is no value."""
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)

    def meta(self) -> dict[str, Any]:
        """All of it as plain data, for a checkpoint."""
        return {"history": self.rows, "sums": self.sums | {"seconds": self._seconds()} if self.sums else {}}

    def restore(self, meta: dict[str, Any]) -> None:
        """Go on from where `meta` was taken."""
        self.rows, self.sums = meta["history"], meta["sums"]

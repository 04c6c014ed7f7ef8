"""What a paper's module is made of: parameters, presets, and the result of its experiment."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field


class PaperParams(BaseModel):
    """The knobs of one paper's experiment; every field typed, bounded and described.

    The defaults of a subclass are its `quick` preset.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    seed: int = Field(0, ge=0, le=2**31 - 1, description="first seed; runs use seed, seed+1, …")
    n_seeds: int = Field(3, ge=1, le=100, description="how many seeds are run; one seed decides no claim")

    @property
    def seeds(self) -> range:
        """The seeds of this experiment."""
        return range(self.seed, self.seed + self.n_seeds)


@dataclass(frozen=True)
class Preset:
    """A named set of parameters, what it is for, and what it may cost."""

    params: PaperParams
    purpose: str
    minutes: float
    memory_gib: float
    needs: str = ""
    """Plain words for a machine or asset that is not everywhere, such as `a GPU with 24 GiB`; empty = none."""
    gpus: int = 0


@dataclass(frozen=True)
class Result:
    """What an experiment found: tidy tables (one observation a row) and scalars.

    Tables hold only strings, booleans, integers and floats, so that a record is small, reviewable JSON.
    """

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)

    def with_table(self, name: str, table: pd.DataFrame) -> Result:
        """A copy in which one table is another; controls are made this way."""
        return Result({**self.tables, name: table}, dict(self.scalars))

    def to_dict(self, digits: int = 6) -> dict[str, Any]:
        """Plain JSON: each table as columns, floats rounded to `digits` significant digits."""

        def tidy(value: Any) -> Any:
            if isinstance(value, float):
                return None if pd.isna(value) else float(f"{value:.{digits}g}")
            return value

        tables = {
            name: {str(column): [tidy(v) for v in frame[column].tolist()] for column in frame.columns}
            for name, frame in self.tables.items()
        }
        return {"tables": tables, "scalars": {name: tidy(float(v)) for name, v in self.scalars.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`, up to its rounding."""
        tables = {name: pd.DataFrame(columns) for name, columns in data["tables"].items()}
        return cls(tables, dict(data["scalars"]))

    def __repr__(self) -> str:
        text = io.StringIO()
        for name, frame in self.tables.items():
            text.write(f"{name}: {len(frame)} rows of {', '.join(map(str, frame.columns))}\n")
        for name, value in self.scalars.items():
            text.write(f"{name} = {value:.4g}\n")
        return text.getvalue().rstrip()

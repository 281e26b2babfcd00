"""Tables of named columns as numbers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["decode", "encode", "is_table", "with_categories"]


def is_table(x: Any) -> bool:
    """Whether `x` is a pandas `DataFrame`.

    Example:
        >>> is_table(np.zeros((3, 2)))
        False
    """
    pandas = sys.modules.get("pandas")  # who has a table has imported it, and nobody else should pay for that
    return pandas is not None and isinstance(x, pandas.DataFrame)


def with_categories(frame: pd.DataFrame) -> pd.DataFrame:
    """A table whose text columns are pandas categoricals of sorted categories, so that all its parts have the same.

    Raises:
        ValueError: If two columns have one name, or a column holds neither numbers nor text nor categories.

    Example:
        >>> import pandas as pd
        >>> with_categories(pd.DataFrame({"kind": ["b", "a", "b"]})).kind.cat.categories.tolist()
        ['a', 'b']
    """
    from pandas.api import types

    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise ValueError(f"data: expected columns of distinct names, got {str(twice)!r} twice")
    frame = frame.infer_objects()  # columns of objects that are all numbers are numbers
    text = []
    for name, dtype in frame.dtypes.items():
        if types.is_object_dtype(dtype) or types.is_string_dtype(dtype):
            text.append(name)
        elif not (isinstance(dtype, _categorical()) or types.is_numeric_dtype(dtype)) or types.is_complex_dtype(dtype):
            raise ValueError(f"data: expected numbers, text or categories in column {str(name)!r}, got {dtype}")
    return frame.astype(dict.fromkeys(text, "category"))


def encode(frame: pd.DataFrame) -> tuple[np.ndarray, tuple[str, ...], dict[str, tuple]]:
    """A table as an array: numbers and booleans as they are, text and categories as codes 0, 1, ...

    Text is coded in sorted order, a pandas categorical in its own.

    Args:
        frame: The table, of `N` rows and `D` columns.

    Returns:
        `(values, columns, categories)`: a float64 array of shape `(N, D)`, the names of the columns, and the values
        that the codes stand for (as text, unless they are numbers), of each column that has codes.

    Raises:
        ValueError: If a column has missing or infinite values, or is refused by `with_categories`.

    Warns:
        UserWarning: If a column is text, whose codes depend on what occurs in it.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"age": [30, 41], "sex": ["m", "f"]}).astype({"sex": "category"})
        >>> values, columns, categories = encode(frame)
        >>> values.tolist(), columns, categories
        ([[30.0, 1.0], [41.0, 0.0]], ('age', 'sex'), {'sex': ('f', 'm')})
    """
    given, frame = frame, with_categories(frame)
    pairs = zip(frame.dtypes.items(), given.dtypes, strict=True)
    if text := [
        name for (name, new), old in pairs if isinstance(new, _categorical()) and not isinstance(old, type(new))
    ]:
        warnings.warn(
            f"data: text in {', '.join(map(str, text))} is coded by what occurs in this table, others may have other "
            f"codes; make it a category before the table is split: frame.astype({{{text[0]!r}: 'category'}})",
            stacklevel=3,
        )
    columns = tuple(str(name) for name in frame.columns)
    values, categories = np.empty((len(frame), len(columns))), {}
    for i, name in enumerate(columns):
        column = frame.iloc[:, i]
        if isinstance(column.dtype, _categorical()):
            meanings = column.cat.categories.tolist()
            categories[name] = tuple(
                value if isinstance(value, str | int | float) else str(value) for value in meanings
            )
            column = column.cat.codes.where(column.notna())
        values[:, i] = column.to_numpy(dtype="float64", na_value=np.nan)
        if count := int((~np.isfinite(values[:, i])).sum()):
            raise ValueError(
                f"data: expected finite values, got {count} NaN or infinite of {len(frame)} in column {name!r}"
            )
    return values, columns, categories


def decode(values: Any, columns: Sequence[str], categories: Mapping[str, Sequence]) -> pd.DataFrame:
    """An array as a table, the inverse of `encode`: codes are replaced by what they stand for.

    Args:
        values: Array or tensor of shape `(N, D)`, such as draws from a model of a table.
        columns: Names of the `D` columns.
        categories: The values that the codes stand for, of each column that has codes.

    Returns:
        A `DataFrame` of `N` rows, where columns of whole numbers are of integers.

    Raises:
        ValueError: If there are more or fewer columns than names, or a code stands for nothing.

    Example:
        >>> decode(np.array([[30.0, 1.0], [41.0, 0.0]]), ("age", "sex"), {"sex": ("f", "m")}).sex.tolist()
        ['m', 'f']
    """
    import pandas as pd

    values = np.asarray(values)
    if values.shape[1:] != (len(columns),):
        raise ValueError(f"expected values of shape (*, {len(columns)}), one a column, got {values.shape}")
    frame = pd.DataFrame(values, columns=list(columns))
    for name, meanings in categories.items():
        if unknown := set(frame[name]) - set(range(len(meanings))):
            raise ValueError(f"{name}: expected codes 0 to {len(meanings) - 1}, got {unknown.pop():g}")
        frame[name] = pd.Categorical.from_codes(frame[name].astype(int), pd.Index(meanings))
    return frame.convert_dtypes()


def _categorical() -> type:
    import pandas as pd

    return pd.CategoricalDtype

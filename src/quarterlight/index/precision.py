"""In how many bits a table keeps each number of a vector, and what a search makes of them.

    float32, float16   a column ``vector`` of these numbers, which LanceDB compares with the query
    int8               ``vector`` as whole numbers, and ``signs``: rows proposed by these are ranked by ``vector``
    binary             only ``signs``, a bit for each number: rows proposed by them are ranked by the query's numbers

The bits are those of sentence-transformers' ``quantize_embeddings(precision="ubinary")``.  Its int8 needs the range of
each column over the whole corpus, which a growing table does not have; here each vector is stretched to its own range,
which takes no calibration, since a cosine does not ask for a vector's length.

N rows, D columns, B = ceil(D / 8) bytes of signs.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quarterlight.errors import InputError, did_you_mean

VectorPrecision: TypeAlias = Literal["float32", "float16", "int8", "binary"]
"""How the vectors of a table are kept, finest first."""

VECTOR_PRECISIONS: tuple[VectorPrecision, ...] = get_args(VectorPrecision)

_COLUMNS: dict[VectorPrecision, dict[str, pa.DataType]] = {
    "float32": {"vector": pa.float32()},
    "float16": {"vector": pa.float16()},
    "int8": {"vector": pa.int8(), "signs": pa.uint8()},
    "binary": {"signs": pa.uint8()},
}


def check_precision(precision: str) -> None:
    """Raises InputError, naming the nearest known one, for a precision that there is not."""
    if precision not in VECTOR_PRECISIONS:
        raise InputError(f"There is no precision {precision!r}. {did_you_mean(str(precision), VECTOR_PRECISIONS)}")


def is_signed(precision: VectorPrecision) -> bool:
    """Whether rows are proposed by their signs."""
    return "signs" in _COLUMNS[precision]


def vector_fields(dimension: int, precision: VectorPrecision) -> list[pa.Field]:
    """The columns that hold the vectors of a table."""
    widths = {"vector": dimension, "signs": -(-dimension // 8)}
    return [pa.field(name, pa.list_(kind, widths[name]), nullable=False) for name, kind in _COLUMNS[precision].items()]


def bytes_per_vector(dimension: int, precision: VectorPrecision) -> int:
    """What the numbers of one vector take on the disk, uncompressed.

    >>> [bytes_per_vector(1536, precision) for precision in VECTOR_PRECISIONS]
    [6144, 3072, 1728, 192]
    """
    fields = vector_fields(dimension, precision)
    return sum(field.type.list_size * field.type.value_type.bit_width // 8 for field in fields)


def to_columns(vector_ND: npt.NDArray[np.float32], precision: VectorPrecision) -> dict[str, pa.Array]:
    """The columns of :func:`vector_fields` for float32 vectors, none of which is zero."""
    columns: dict[str, npt.NDArray[Any]] = {}
    if precision == "int8":
        columns["vector"] = np.rint(vector_ND * (127 / np.abs(vector_ND).max(axis=1, keepdims=True))).astype(np.int8)
    elif precision != "binary":
        columns["vector"] = vector_ND.astype(precision)
    if is_signed(precision):
        columns["signs"] = signs(columns.get("vector", vector_ND))  # of what is kept, so that they can be made again
    return {
        name: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(one).reshape(-1)), one.shape[1])
        for name, one in columns.items()
    }


def from_columns(table: pa.Table, dimension: int, precision: VectorPrecision) -> npt.NDArray[np.float32]:
    """The vectors again, float32 [N, D] of L2 norm 1, as near as they were kept; put into columns of the same precision
    they give the same columns."""
    if precision == "binary":
        packed_NB = _numbers(table["signs"], -(-dimension // 8))
        vector_ND = np.unpackbits(packed_NB, axis=1, count=dimension).astype(np.float32) * 2 - 1
    else:
        vector_ND = _numbers(table["vector"], dimension).astype(np.float32)
        if precision != "int8":
            return vector_ND
    return vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)


def signs(vector: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A bit for each number, 1 where it is positive, eight to a byte, the last ones padded with 0."""
    return np.packbits(vector > 0, axis=-1)


def _numbers(column: pa.ChunkedArray, width: int) -> npt.NDArray[Any]:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)

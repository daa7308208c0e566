"""Which columns of a table (Parquet, Arrow) hold the images and the labels, found or named in the specification.

Images are a column of bytes, or of structs with the fields `bytes` and `path`, as the Hugging Face libraries write
them. Labels are integers, or texts, which become the classes in their order.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dino_jax.data.sources.folder import check_file_size
from dino_jax.data.sources.labeled import class_order
from dino_jax.errors import UserError

OPTION = re.compile(r"\?(\w+)=([^?]+)")
# Names of columns that are found among several.
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "cls", "class")


class Columns(NamedTuple):
    """Names of the columns of a table."""

    image: str
    nested: bool  # whether the images are structs, with the image in their field `bytes`
    label: str  # empty: no labels
    texts: bool  # whether the labels are texts
    class_names: Sequence[str]  # of integer labels, as far as the table has them


def split_options(rest: str, known: Sequence[str], what: str) -> tuple[str, dict[str, str]]:
    """Splits PLACE?image=COLUMN?label=COLUMN into the place and the options. Raises UserError if one is not known."""
    options = dict(OPTION.findall(rest))
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"{what}{rest}: no option {unknown[0]}, only {' and '.join(known)}")
    return OPTION.sub("", rest), options


def find_columns(schema: Any, options: Mapping[str, str], what: str) -> Columns:
    """Finds the columns in a `pyarrow.Schema`, or checks those that `options` name as image and label (empty: none).

    Raises: UserError, which begins with `what`, if there is no such column, or several that may be the images.
    """
    features = _features(schema)
    image = options.get("image") or _found_image(schema, features, what)
    label = options["label"] if "label" in options else _found_label(schema, features, what)
    for column in filter(None, (image, label)):
        if column not in schema.names:
            raise UserError(f"{what}: no column {column} among {', '.join(schema.names)}")
    if not _is_image(schema.field(image).type):
        names = ", ".join(schema.names)
        raise UserError(f"{what}: no column {image} of bytes among {names}: it is {_kind(schema, image)}")
    if label and not _is_label(schema.field(label).type):
        raise UserError(f"{what}: the column {label} is {_kind(schema, label)}, not integers or texts")
    class_names = [str(name) for name in features.get(label, {}).get("names") or ()]
    texts = bool(label) and is_text(schema.field(label).type)
    return Columns(image, not _is_binary(schema.field(image).type), label, texts, class_names)


def label_numbers(parts: list[Any], columns: Columns, what: str) -> tuple[np.ndarray, Sequence[str], int]:
    """Returns the class of each row, int32 [n], the names of the classes and their number.

    `parts` are the labels of the files, each a `pyarrow.ChunkedArray`. Rows without a label (null, or an integer
    outside 0 .. 2**31 - 2) have -1, and a line on stderr counts them.

    Raises: UserError, which begins with `what`, if there are more classes than the table names.
    """
    column, class_names = joined(parts, "string" if columns.texts else "int64"), columns.class_names
    if columns.texts:
        encoded = column.dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        class_names = class_order(set(texts))
        number = {name: k for k, name in enumerate(class_names)}
        classes = np.array([*(number[text] for text in texts), -1], np.int32)  # the last for null
        labels = classes[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    else:
        wide = column.fill_null(-1).to_numpy(zero_copy_only=False)
        labels = np.where((wide >= 0) & (wide < 2**31 - 1), wide, -1).astype(np.int32)
    num_classes = len(class_names) or int(labels.max(initial=-1)) + 1
    if labels.max(initial=-1) >= num_classes:
        raise UserError(f"{what}: label {labels.max()} in {columns.label}, whose classes are 0 to {num_classes - 1}")
    if without := int(np.sum(labels < 0)):
        print(f"{columns.label}: {without:,} of {len(labels):,} images have no label", file=sys.stderr)
    return labels, class_names, num_classes


def stored_image(image: bytes | None) -> bytes:
    """Returns the image of a row. Raises OSError if there is none, or it is too large."""
    if image is None:
        raise OSError("the row has no image")
    check_file_size(len(image))
    return image


def joined(parts: list[Any], kind: str) -> Any:
    """Returns one `pyarrow.Array` of a type from chunked arrays, whose types may differ in width and encoding."""
    import pyarrow as pa  # optional; whoever has a ChunkedArray has imported it

    chunks = [chunk.cast(kind, safe=False) for part in parts for chunk in part.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], kind)


def is_text(kind: Any) -> bool:
    """Whether a `pyarrow.DataType` holds texts, plain or as a dictionary."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _is_label(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_integer(kind) or is_text(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_image(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _kind(schema: Any, column: str) -> str:
    return str(schema.field(column).type).partition("<")[0]


def _found_image(schema: Any, features: Mapping[str, Any], what: str) -> str:
    possible = [field.name for field in schema if _is_image(field.type)]
    found = [name for name in possible if features.get(name, {}).get("_type") == "Image"] or possible
    if len(found) == 1:
        return found[0]
    if named := [name for name in IMAGE_NAMES if name in found]:
        return named[0]
    which = f"several columns of bytes, {', '.join(found)}" if found else "no column of bytes"
    raise UserError(f"{what}: {which} among {', '.join(schema.names)}: name one with ?image=COLUMN")


def _found_label(schema: Any, features: Mapping[str, Any], what: str) -> str:
    """Returns the column of labels, or "" if there is none, or if none of several is called `label`."""
    possible = [field.name for field in schema if _is_label(field.type)]
    declared = [name for name in possible if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in LABEL_NAMES if name in possible]
    if named or not declared:
        return named[0] if named else ""
    if len(declared) > 1:
        print(f"{what}: {' and '.join(declared)} may be the labels: ?label=COLUMN chooses one", file=sys.stderr)
        return ""
    return declared[0]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Returns the top-level features that the Hugging Face libraries describe in a schema, {} if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}

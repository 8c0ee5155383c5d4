"""States as JSON: values that a file can hold without being able to run anything.

Numbers, strings, None, lists and dictionaries are JSON's own. What Python and torch have beside
them is a dictionary with one reserved key, `"@"`, that says which of `KINDS` it is.
"""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.training.tensor_files import bytes_of

KIND = "@"


def encode(value: Any, where: str) -> Any:
    """Make what `json.dumps` takes, and `decode` turns into the value again.

    Args:
        where: the name of the value in messages.

    Raises:
        TypeError: a value of another type, by name.
    """
    match value:
        case None | bool() | int() | str() if type(value) in (type(None), bool, int, str):
            return value
        case float() if type(value) is float:
            return value if math.isfinite(value) else {KIND: "float", "value": repr(value)}
        case list() if type(value) is list:
            return [encode(x, f"{where}[{n}]") for n, x in enumerate(value)]
        case tuple() | deque() | set() if type(value) in (tuple, deque, set):
            items = [encode(x, f"{where}[{n}]") for n, x in enumerate(value)]
            return {KIND: type(value).__name__, "items": items}
        case dict() if type(value) in (dict, OrderedDict, Counter):
            return _encode_mapping(value, where)
        case Tensor():
            return {KIND: "tensor", **_encode_tensor(value)}
        case torch.dtype():
            return {KIND: "dtype", "name": str(value).removeprefix("torch.")}
        case bytes():
            return {KIND: "bytes", "data": base64.b64encode(value).decode()}
    numpy = sys.modules.get("numpy")
    arrays: Any = () if numpy is None else (numpy.ndarray, numpy.generic)
    if isinstance(value, arrays) and value.dtype.kind in "biuf":
        return {
            KIND: "ndarray" if type(value).__name__ == "ndarray" else "numpy scalar",
            "dtype": value.dtype.str,
            "shape": list(value.shape),
            "data": base64.b64encode(value.tobytes()).decode(),
        }
    raise TypeError(
        f"{where} must be made of numbers, strings, lists, tuples, dictionaries, arrays and "
        f"tensors to be saved, got {type(value).__name__}: {value!r:.80}; leave it out of the "
        "state, or turn it into these."
    )


def decode(value: Any) -> Any:
    """Make the value that `encode` was given.

    Raises:
        ValueError: a kind that this version does not know.
    """
    if isinstance(value, list):
        return [decode(x) for x in value]
    if not isinstance(value, dict):
        return value
    match value.get(KIND):
        case None:
            return {key: decode(x) for key, x in value.items()}
        case "float":
            return float(value["value"])
        case "tuple" | "deque" | "set" as kind:
            make: Any = {"tuple": tuple, "deque": deque, "set": set}[kind]
            return make(decode(x) for x in value["items"])
        case "dict" | "OrderedDict" | "Counter" as kind:
            make = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}[kind]
            return make({decode(key): decode(x) for key, x in value["items"]})
        case "tensor":
            return _decode_tensor(value)
        case "dtype":
            return getattr(torch, value["name"])
        case "bytes":
            return base64.b64decode(value["data"])
        case "ndarray" | "numpy scalar" as kind:
            import numpy

            data = base64.b64decode(value["data"])
            array = numpy.frombuffer(data, dtype=value["dtype"]).reshape(value["shape"])
            return array.copy() if kind == "ndarray" else array[()]
    raise ValueError(f"a saved state has an unknown kind of value, {value[KIND]!r}.")


def _encode_mapping(value: Mapping[Any, Any], where: str) -> Any:
    plain = type(value) is dict and all(type(key) is str for key in value) and KIND not in value
    if plain:
        return {key: encode(x, f"{where}[{key!r}]") for key, x in value.items()}
    kind = type(value).__name__ if type(value) in (OrderedDict, Counter) else "dict"
    items = [
        [encode(key, f"a key of {where}"), encode(x, f"{where}[{key!r}]")]
        for key, x in value.items()
    ]
    return {KIND: kind, "items": items}


def _encode_tensor(x: Tensor) -> dict[str, Any]:
    if x.layout != torch.strided or hasattr(x, "to_local"):
        raise TypeError("a tensor in a state must be dense and not a DTensor to be saved.")
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "shape": list(x.shape),
        "data": base64.b64encode(bytes_of(x)).decode(),
    }


def _decode_tensor(value: Mapping[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(value["data"]))
    dtype = getattr(torch, value["dtype"])
    if not data:
        return torch.empty(value["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(value["shape"]).clone()

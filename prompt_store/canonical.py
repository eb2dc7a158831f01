"""One spelling per JSON value, so that equal documents have equal digests.

Sorted keys, no spaces, UTF-8 without escapes beyond JSON's own, no NaN or infinity, keys are strings. Floats take
Python's shortest spelling that reads back the same. Digests rest on this: changing it changes every digest.
"""

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Raises ValueError for NaN, infinity, keys that are not text, or what JSON cannot say."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        # json.dumps has refused circular values by now, so this walk ends.
        _check_keys(value)
        return text.encode("utf-8")
    except (TypeError, RecursionError, UnicodeEncodeError) as error:
        raise ValueError(str(error)) from error


def canonical_digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _check_keys(value: Any) -> None:
    # json.dumps would silently turn the keys 1 and True into text.
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"keys must be text, not {key!r}")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)

"""Identity: what a node is, never where or how it runs.

A node's identity is a JSON document: the stage kind and its version, the task's references, a digest of the source of
the user's own modules, the stage's config, the seed, and the fingerprints of its inputs. Its fingerprint is the sha256
of that document in canonical form. Storage, tracking, resources, number of workers and retries are no part of it, by
construction: `plan` never hands them to this module.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(document: Any) -> str:
    """JSON with sorted keys, no spaces, and one way to write each number (1.0 and 1 are the same)."""
    return json.dumps(_canonical(document), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def fingerprint(identity: Mapping[str, Any]) -> str:
    """The first 16 hexadecimal digits of the sha256 of the canonical JSON: 64 bits, the name of the node's folder."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]


def explain_change(
    old: Mapping[str, Any], new: Mapping[str, Any], *, names: Mapping[str, str] | None = None
) -> list[str]:
    """What differs between two identities, in the user's words: `config.sparsity 0.5 -> 0.6`, `mnist.py changed`.

    `names` gives the node behind each input's fingerprint, so that a changed input can be called by its name.
    """
    changes: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if canonical_json(before) == canonical_json(after):
            continue
        if key == "sources":
            changes.extend(_explain_sources(before or {}, after or {}))
        elif key == "inputs":
            changes.extend(_explain_inputs(before or {}, after or {}, names or {}))
        elif isinstance(before, Mapping) or isinstance(after, Mapping):
            changes.extend(_explain_values(key, before, after))
        else:
            changes.append(f"{key} {_show(before)} -> {_show(after)}")
    return changes


def _explain_sources(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    verb = {(True, True): "changed", (True, False): "is gone", (False, True): "is new"}
    return [
        f"{path} {verb[path in old, path in new]}" for path in sorted({*old, *new}) if old.get(path) != new.get(path)
    ]


def _explain_inputs(old: Mapping[str, list[str]], new: Mapping[str, list[str]], names: Mapping[str, str]) -> list[str]:
    changes = []
    for slot in dict.fromkeys([*old, *new]):
        came = [f for f in new.get(slot, []) if f not in old.get(slot, [])]
        went = [f for f in old.get(slot, []) if f not in new.get(slot, [])]
        before = {names.get(f, "an input") for f in went}
        after = {names.get(f, "an input") for f in came}
        changes += [f"{slot}: {node} changed" for node in sorted(after & before)]
        changes += [f"{slot}: {node} is new" for node in sorted(after - before)]
        changes += [f"{slot}: {node} is gone" for node in sorted(before - after)]
    return changes


def _explain_values(place: str, old: Any, new: Any) -> list[str]:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [f"{place} {_show(old)} -> {_show(new)}"]
    changes = []
    for key in dict.fromkeys([*old, *new]):
        if canonical_json(old.get(key)) != canonical_json(new.get(key)):
            changes += _explain_values(f"{place}.{key}", old.get(key), new.get(key))
    return changes


def _show(value: Any) -> str:
    text = "nothing" if value is None else canonical_json(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."

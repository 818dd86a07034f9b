"""The problems that several stores share: the same questions, run in all of them."""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from probe.errors import InputError
from probe.schema import DONE
from recipes._metric import PROBLEM

NOT_ASKED = ("", "bos", "bot", "latent", "eot", "answer", "generated")  # segments
BROKEN = "\ufffd"  # what a token says that is part of a character


def shared(stores: Mapping[str, xr.Dataset]) -> tuple[dict[str, xr.Dataset], int]:
    """The stores' common problems that are done in all, in one order; how many are left out.

    Warns of those that are left out.

    Raises:
        InputError: These are no stores of the same problems; what differs.
    """
    ids = {name: _ids(name, ds) for name, ds in stores.items()}
    first, *others = map(dict.fromkeys, ids.values())
    common = [one for one in first if all(one in other for other in others)]
    if not common:
        some = "; ".join(f"{name} has {_some(one)}" for name, one in ids.items())
        raise InputError(
            f"the stores have no problem in common: {some}. Capture the same file with each model."
        )
    parts = {name: _picked(ds, _places(ids[name], common)) for name, ds in stores.items()}
    _require_same_questions(parts)
    done = np.all([ds["status"].values == DONE for ds in parts.values()], axis=0)
    if done.sum() < 2:
        raise InputError(
            f"of {len(common)} common problems, {done.sum()} ran in all of {', '.join(stores)}, "
            "and the spread over problems needs 2. Capture more; `error` says why problems failed."
        )
    every = len(set[str]().union(*ids.values()))
    if left_out := every - int(done.sum()):
        warnings.warn(_left_out(stores, ids, every, left_out), stacklevel=3)
    return {name: _picked(ds, np.flatnonzero(done)) for name, ds in parts.items()}, left_out


def _ids(name: str, ds: object) -> list[str]:
    """The problems of a store, after a look whether it is one."""
    if not isinstance(ds, xr.Dataset) or not {"pattern", "status"} <= set(ds.variables):
        held = ", ".join(map(str, ds)) if isinstance(ds, xr.Dataset) else type(ds).__name__
        raise InputError(
            f"{name} is no opened store with patterns, but {held or 'empty'}. "
            "Open one: probe.open(path)"
        )
    ids = list(map(str, ds.get_index(PROBLEM)))
    if twice := [one for one, times in Counter(ids).items() if times > 1]:
        raise InputError(f"{name} has the problem {twice[0]!r} twice. Give each an id of its own.")
    return ids


def _places(ids: list[str], wanted: list[str]) -> list[int]:
    at = {one: place for place, one in enumerate(ids)}
    return [at[one] for one in wanted]


def _some(ids: list[str]) -> str:
    return f"{', '.join(map(repr, ids[:3]))}{', ...' if len(ids) > 3 else ''} ({len(ids)})"


def _picked(ds: xr.Dataset, places: Any) -> xr.Dataset:
    """Some problems; the store itself where it is all of them, which reads faster."""
    whole = np.array_equal(places, np.arange(ds.sizes[PROBLEM]))
    return ds if whole else ds.isel({PROBLEM: places})


def _left_out(
    stores: Mapping[str, xr.Dataset], ids: Mapping[str, Any], every: int, left_out: int
) -> str:
    parts = []
    for name, ds in stores.items():
        lacking, failed = every - len(ids[name]), int((ds["status"].values != DONE).sum())
        counts = [f"lacks {lacking}"] * bool(lacking) + [f"failed {failed}"] * bool(failed)
        parts += [f"{name} {' and '.join(counts)}"] if counts else []
    return f"{left_out} of {every} problems are left out: {'; '.join(parts)}"


def _require_same_questions(parts: Mapping[str, xr.Dataset]) -> None:
    """Refuse problems that have the same id and ask something else, where the stores tell."""
    hashes = {ds.attrs.get("problems", {}).get("sha256") for ds in parts.values()}
    if len(hashes) == 1 and None not in hashes:
        return
    for tell, verb in ((_asked, "asks"), (_expected, "expects")):
        first, *others = ((name, tell(ds)) for name, ds in parts.items())
        for name, texts in others:
            for here, there, one in zip(first[1], texts, parts[name][PROBLEM].values, strict=True):
                if here and there and _letters(here) != _letters(there):
                    here, there = _apart(here.strip(), there.strip())
                    raise InputError(
                        f"problem {str(one)!r} {verb} {here!r} in {first[0]} and {there!r} in "
                        f"{name}. Capture the same file with each model."
                    )


def _apart(a: str, b: str) -> tuple[str, str]:
    """Some of two texts, from a little before where they part."""
    shorter = min(len(a), len(b))
    start = next((n for n in range(shorter) if a[n] != b[n]), shorter)
    a, b = (text[max(0, start - 20) :] for text in (a, b))
    return _brief(a), _brief(b)


def _brief(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _letters(text: str) -> str:
    """What two tokenizers agree on."""
    return "".join(text.split()).casefold()


def _asked(ds: xr.Dataset) -> list[str]:
    """The question of each problem; "" where not all of its tokens are stored, or can be read."""
    if not {"token", "segment", "key_position", "length"} <= set(ds.variables):
        return [""] * ds.sizes[PROBLEM]
    columns = (ds[name].values for name in ("token", "segment", "key_position", "length"))
    return [_question(*one) for one in zip(*columns, strict=True)]


def _question(token: Any, segment: Any, position: Any, length: int) -> str:
    position = position[position >= 0]
    whole = len(position) >= length and np.array_equal(position, np.arange(len(position)))
    text = "".join(str(word) for word in token[~np.isin(segment.astype(object), NOT_ASKED)])
    return text if whole and BROKEN not in text else ""


def _expected(ds: xr.Dataset) -> list[str]:
    return list(map(str, ds["expected"].values)) if "expected" in ds else [""] * ds.sizes[PROBLEM]

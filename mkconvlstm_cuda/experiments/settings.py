"""Settings are compared with the experiment's own before anything is trained."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from .experiment import Experiment, Measured, Results, Settings

KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def check(settings: Settings, defaults: Settings) -> None:
    """Settings are JSON values such as the defaults, and have seeds and variants. Raises ValueError naming one."""
    seeds, variants = settings["seeds"], settings["variants"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds: got {seeds!r}, wanted a list of at least one integer, none below 0")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: got {seeds!r}, wanted each once")
    if not isinstance(variants, dict) or not variants:
        raise ValueError(f"variants: got {variants!r}, wanted at least one, by name")
    for name in settings.keys() & defaults.keys() - {"seeds"}:
        compare(name, settings[name], [defaults[name]])
    if "batch_size" in settings and settings.get("test_clips", math.inf) < settings["batch_size"]:
        raise ValueError(
            f"test_clips: got {settings['test_clips']}, wanted at least batch_size: {settings['batch_size']}"
        )


def compare(name: str, value: Any, examples: Collection[Any]) -> None:
    """Raises ValueError unless `value` has the JSON type and structure of one of `examples`, and is in its range.

    Where all examples are positive, integers are at least 1, other numbers at least 0.
    """
    kinds = {type(example) for example in examples}
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        wanted = " or ".join(words for kind, words in KINDS.items() if kind in kinds)
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
    same = [example for example in examples if isinstance(example, (int, float) if type(value) is int else type(value))]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least = -math.inf if min(same) <= 0 else 0 if float in kinds else 1
        if not math.isfinite(value) or value < least:
            raise ValueError(f"{name}: got {value}, wanted a number of at least {least}")
    if isinstance(value, (list, dict)) and not value:
        raise ValueError(f"{name}: got {value!r}, wanted at least one entry")
    if isinstance(value, list):
        for each in value:
            compare(f"an entry of {name}", each, [entry for example in same for entry in example])
    elif isinstance(value, dict):
        compare_objects(name, value, same)


def compare_objects(name: str, value: Mapping[str, Any], examples: Collection[Mapping[str, Any]]) -> None:
    """As :func:`compare`, of kernel sizes, of objects under any names, or of an object with names of its own."""
    entries = [entry for example in examples for entry in example.values()]
    if all(key.isdecimal() for example in examples for key in example):
        if wrong := [key for key in value if not key.isdecimal() or int(key) % 2 == 0]:
            raise ValueError(f"{name}: got {', '.join(map(repr, wrong))}, wanted odd kernel sizes")
    elif not all(isinstance(entry, dict) for entry in entries):
        missing = set.intersection(*map(set, examples)) - value.keys()
        unknown = value.keys() - set.union(*map(set, examples))
        if missing or unknown:
            raise ValueError(f"{name}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
        for key, entry in value.items():
            compare(f"{name}: {key}", entry, [example[key] for example in examples if key in example])
        return
    for key, entry in value.items():
        compare(f"{name}: {key}", entry, entries)


def rehearse(experiment: Experiment, settings: Settings, own: Collection[str]) -> None:
    """Judges runs whose numbers are all 1. Raises ValueError naming the settings `own` where a claim lacks a run."""
    runs = [Measured(defaultdict(lambda: 1.0))] * len(settings["seeds"])
    try:
        experiment.judge(settings, Results(dict.fromkeys(settings["variants"], runs)))
    except (LookupError, ValueError, TypeError) as error:
        raise ValueError(f"{', '.join(own)}: the claims of {experiment.name} cannot be judged so: {error!r}") from error

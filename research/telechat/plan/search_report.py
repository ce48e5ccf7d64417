"""The result of a search as a table, a picture, and the best plan as a recipe."""
import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import List, Sequence

import yaml

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, write_text
from research.telechat.common.picture import LIGHT, drawing, save
from research.telechat.common.table import table
from research.telechat.plan.plan import PLANNED_FOR, Plan, read_plan
from research.telechat.plan.search import Found, Served
from research.telechat.plan.timing import StepTime
from research.telechat.recipe.legacy import translate
from research.telechat.recipe.read import merge, read_recipe, recipe_files

MARK = "# Found by `telechat plan --search`; times are estimates."
_PARTS = {"matrix": "matrix products", "attention": "attention", "memory": "memory-bound operators",
          "links": "communication in the layers", "latency": "calls", "pipeline": "pipeline bubble",
          "gradients": "gradients and parameters", "optimizer": "optimizer"}
_GRAYS = ("#14385f", "#3f6a9b", LIGHT, "#b3261e", "#e3a29d", "#555555", "#999999", "#dddddd")
_HATCHES = ("", "", "", "//", "", "xx", "..", "")


def degrees(plan: Plan) -> str:
    """Degrees in a few letters, such as dp2 mp8 pp4x3."""
    virtual = f"x{plan.virtual_stages}" if plan.virtual_stages > 1 else ""
    parts = [f"dp{plan.dp}", f"mp{plan.mp}", f"pp{plan.pp}{virtual}"]
    return " ".join(parts + ([f"cp{plan.cp}"] if plan.cp > 1 else []))


def _share(time: StepTime, name: str) -> str:
    return f"{time.parts[name] / time.seconds:.0%}"


def search_table(found: Sequence[Found], now: StepTime) -> str:
    """The plans, the fastest first. now: of the recipe as it is."""
    rows: List[List[object]] = [["plan", "batch", "micro-batches", "recomputed", "GB", "s/step", "tokens/s/card",
                                 "limit"]]
    for one in found:
        plan, time = one.plan, one.time
        rows.append([degrees(plan), plan.batch, plan.micro_batches, one.recomputed, f"{one.memory_gb:.1f}",
                     f"{time.seconds:.2f}", f"{time.tokens_per_second / time.ranks:,.0f}",
                     f"{_PARTS[time.limit]} {_share(time, time.limit)}"])
    first = found[0].time
    lines = [table(rows), "", "estimate for the first: " + ", ".join(
        f"{_PARTS[name]} {seconds:.2f} s" for name, seconds in first.parts.items() if seconds >= 0.005)]
    if now.ranks == first.ranks and now.tokens == first.tokens:
        lines.append(f"the recipe as given: {now.seconds:.2f} s per step, {now.tokens_per_second / now.ranks:,.0f} "
                     f"tokens/s/card; the first plan takes {1 - first.seconds / now.seconds:.0%} less time")
    return "\n".join(lines)


def search_json(found: Sequence[Found], now: StepTime) -> JsonObject:
    """The same as an object: the plans, the fastest first. now: of the recipe as it is."""
    plans = [{"degrees": degrees(one.plan), "memory_gb": one.memory_gb, "seconds": one.time.seconds,
              "tokens_per_second_per_card": one.time.tokens_per_second / one.time.ranks, "parts": one.time.parts,
              "recomputed": one.recomputed, "keys": one.changes} for one in found]
    return {"ranks": found[0].plan.ranks, "plans": plans, "seconds_of_the_recipe": now.seconds}


def prediction_table(found: Sequence[Served]) -> str:
    """Plans of prediction by cards and batch."""
    rows: List[List[object]] = [["cards", "batch", "weights GB", "KV cache GB", "longest context", "tokens/s",
                                 "ms/token"]]
    rows += [[one.cards, one.batch, f"{one.weights_gb:.1f}", f"{one.cache_gb:.1f}", f"{one.context:,}",
              f"{one.tokens_per_second:,.0f}", f"{1e3 * one.seconds_per_token:.1f}"] for one in found]
    return table(rows) + "\nestimated; GB per card, tokens/s over all sequences of a batch"


def draw_search(found: Sequence[Found], path: Path) -> None:
    """Time by part and memory of the plans, as a PNG. Raises ImportError without matplotlib."""
    with drawing((10, 1.6 + 0.42 * len(found)), {}) as (figure, _):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        places = list(range(len(found)))[::-1]
        begin = [0.0] * len(found)
        for (name, title), color, hatch in zip(_PARTS.items(), _GRAYS, _HATCHES):
            seconds = [one.time.parts[name] for one in found]
            if max(seconds) > 0.002 * found[0].time.seconds:
                left.barh(places, seconds, left=begin, color=color, hatch=hatch, edgecolor="white", label=title)
                begin = [at + more for at, more in zip(begin, seconds)]
        left.set_yticks(places, [f"{degrees(one.plan)}, batch {one.plan.batch}, recomputed: {one.recomputed}"
                                 for one in found])
        left.set_title("estimated seconds per step")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
        right.barh(places, [one.memory_gb for one in found], color=LIGHT, edgecolor=_GRAYS[0])
        right.axvline(found[0].plan.limit_gb, color="black", linestyle="--", label="max_device_memory")
        right.set_title("GB on the fullest card")
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
        save(figure, path)


def differing(recipe: JsonObject, changes: JsonObject) -> JsonObject:
    """The sections and keys of `changes` whose values a complete recipe does not have already."""
    kept: JsonObject = {}
    for dotted, value in changes.items():
        *names, key = dotted.split(".")
        place: object = recipe
        for name in names:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict) and place.get(key) == value:
            continue
        if key == "pipeline_config" and isinstance(value, dict) and not value.get("pipeline_interleave") and not (
                isinstance(place, dict) and (place.get(key) or {}).get("pipeline_interleave")):
            continue                                     # no interleaving, as before
        target = kept
        for name in names:
            target = target.setdefault(name, {})
        target[key] = value
    return kept


def changed(before: JsonObject, now: JsonObject, section: str = "") -> JsonObject:
    """{dotted key: value} of what `now` has otherwise than `before`, but for the device that is planned for."""
    found: JsonObject = {}
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found.update(changed(old, value, f"{section}{key}."))
        elif value != old and key != PLANNED_FOR:
            found[section + key] = value
    return found


def check_target(source: Path, path: Path) -> None:
    """Raise ConfigError unless `write_recipe` may write `path`: it is new, or of an earlier search, and `source`
    neither is nor inherits it."""
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        raise ConfigError(f"{path} exists and was not written by a search; use another file with --write_recipe")
    if path.resolve() in recipe_files(source):
        raise ConfigError(f"--write_recipe {path}: {source} is or inherits this file; use another one")


def write_recipe(best: Found, recipe: JsonObject, source: Path, path: Path) -> None:
    """Write the plan as a recipe over `source`; only what differs from it. recipe: the one searched, with its options.

    Raises:
        ConfigError: `check_target` refuses the file, it cannot be written, or it would be another plan.
    """
    check_target(source, path)
    plan, time = best.plan, best.time
    head = [MARK, f"# {plan.model.net_name}, {plan.ranks} cards ({degrees(plan)}), {plan.model.seq_length} tokens per "
            f"sequence: {time.seconds:.2f} s per step of {plan.step_tokens // plan.model.seq_length} sequences,",
            f"# {time.tokens_per_second / time.ranks:,.0f} tokens/s per card, {best.memory_gb:.1f} GB of "
            f"{plan.limit_gb:g} GB; recomputed: {best.recomputed}."]
    base = os.path.relpath(source.resolve(), path.resolve().parent)
    original = copy.deepcopy(read_recipe(source))
    translate(original)
    kept = differing(original, {**changed(original, recipe), **best.changes})
    written = merge(read_recipe(source), kept)
    translate(written)
    other = replace(read_plan(written), chip=plan.chip)
    differ = [name for name, value in vars(plan).items() if getattr(other, name) != value]
    if differ:
        raise ConfigError(f"--write_recipe {path}: not written because it would be another plan ({', '.join(differ)}); "
                          "this is a bug in the search, please report it")
    body = yaml.safe_dump({"base_config": base, **kept}, sort_keys=False, allow_unicode=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(head) + "\n" + body)
    except OSError as err:
        raise ConfigError(f"--write_recipe {path}: {err.strerror or err}; use another file") from err

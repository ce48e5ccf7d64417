"""How benchmark results are shown: lines of each benchmark's table, and the whole of docs/benchmarks.md.

Nothing is measured here; run_all.py does, published.py has what others measured.
"""
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from published import published_section

from research.telechat.common.environment import cores

# Heads of the tables: what is measured, its figure, the limit measured in the same run, how they compare.
HEADS = {
    "preprocessing": ["data", "the command (median)", "limit: the bare tokenizer, one thread", "times the limit"],
    "conversion": ["checkpoint", "the command (median), peak memory", "limit: cp of the same files (median)",
                   "times the limit"],
    "training": ["one step", "time (median)", "limit: best matrix product", "share of the limit"],
    "compile": ["layers", "until the end of the first step", "reference: the smallest number of layers",
                "times the reference"],
    "by_layer": ["model", "further steps (median), first step", "memory", "time of a whole step"],
    "loss": ["step", "time (median)", "memory", "memory of the first line"],
    "master_weights": ["weights kept as", "share of the exact distance (relative error)",
                       "limit: AdamW in float64", "fall of the loss, of that in float32"],
    "generation": ["sequences at once", "decoding (median), first token", "limit: reading weights and cache",
                   "share of the limit"],
    "planner": ["quantity", "compiled", "reference: the planner's arithmetic", "planner against compiled"],
}
_TARGETS = {"preprocessing": "Target: at most 3 times.", "conversion": "Target: at most 3 times, and at most 1.5 GB of "
            "memory above the largest tensor.", "compile": "Target: 64 layers in at most 3 times the time of 8."}


def preprocessing_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of preprocess.py."""
    return [[f"{row['conversations']:,} conversations, {row['tokens']:,} tokens",
             f"{row['seconds']:.1f} s, {row['tokens_per_second']:,} tokens/s, peak {row['peak_megabytes']:,} MB",
             f"{row['raw_seconds']:.1f} s, {row['raw_tokens_per_second']:,} tokens/s", f"{row['ratio']:.2f}"]
            for row in figures["rows"]]


def conversion_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of convert.py."""
    return [[f"{row['model']} sizes, {row['gigabytes']:.2f} GB, {row['input']} to {row['output']}",
             f"{row['seconds']:.2f} s, {row['peak_gigabytes']:.2f} GB (largest tensor "
             f"{row['largest_tensor_gigabytes']:.2f} GB)", f"{row['copy_seconds']:.2f} s",
             f"{row['ratio']:.2f}"] for row in figures]


def training_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of train.py."""
    names = {"mindspore": "this project, MindSpore", "torch": "the same formulas in PyTorch"}
    rows = [[names.get(row["framework"], row["framework"]), f"{row['seconds'] * 1e3:.0f} ms",
             f"{row['peak_gflops']:.0f} GFLOP/s", f"{row['share_of_peak']:.0%}"] for row in figures]
    times = {row["framework"]: row["seconds"] for row in figures}
    if len(times) == 2:
        rows.append(["MindSpore over PyTorch", f"{times['mindspore'] / times['torch']:.2f} times", "-", "-"])
    return rows


def compile_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of train.py --compile."""
    least = figures[0]
    return [[str(row["layers"]), f"{row['seconds']:.1f} s", f"{least['seconds']:.1f} s ({least['layers']})",
             f"{row['seconds'] / least['seconds']:.2f}"] for row in figures]


def by_layer_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of train.py --by_layer."""
    return [[f"{row['layers']} layers, {row['way']}", f"{row['seconds']:.2f} s, {row['first']:.1f} s",
             f"{row['gigabytes']:.2f} GB", f"{row['seconds'] / figures[0]['seconds']:.2f} times"] for row in figures]


def loss_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of train.py --loss."""
    return [[f"{row['tokens']:,} tokens, {row['way']}", f"{row['seconds']:.2f} s", f"{row['gigabytes']:.2f} GB",
             f"{row['gigabytes'] / figures[0]['gigabytes']:.0%}"] for row in figures]


def master_weights_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of master_weights.py."""
    curves = figures.get("curves", {})
    return [[name, f"{share:.5f} ({error:.5f})", "1 (0)", f"{curves[name]['share']:.2%}" if name in curves else "-"]
            for name, (share, error) in figures["distances"].items()]


def generation_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of generate.py."""
    rows = []
    for row in figures["results"]:
        speed = statistics.median(row["all_decode_tokens_per_second"])
        limit = row["decode_tokens_per_second"] / row["share_of_limit"] if row.get("share_of_limit") else None
        rows.append([f"{row['batch']} ({row['name']})",
                     f"{speed:,.0f} tokens/s, {row['first_token_seconds'] * 1e3:.0f} ms",
                     f"{limit:,.0f} tokens/s" if limit else "-", f"{speed / limit:.0%}" if limit else "-"])
    return rows


def planner_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of plan.py --compile."""
    compiled, rank = figures["compiled"], figures["rank"]
    (graph,) = [graph for name, graph in compiled["graphs"].items() if "step" in name]
    memory = figures["stages"][rank["stage"]]

    def line(what: str, theirs: float, mine: float) -> List[str]:
        return [what, f"{theirs / 1e6:,.2f} MB", f"{mine / 1e6:,.2f} MB",
                f"{100 * (mine - theirs) / theirs:+.1f} %" if theirs else "-"]
    effort = f"{compiled['seconds']['compile']:.0f} s, {compiled['compiler_memory_mb'] / 1e3:.1f} GB of memory"
    return [["compile time", effort, "-", "-"], ["operators in the graph", f"{graph['nodes']:,}", "-", "-"],
            *[line(f"{key} per card", graph["memory"][key]["bytes"], memory[key])
              for key in ("parameters", "optimizer")],
            line("sent per card and step", graph["communication"]["bytes"], rank["sent_bytes"])]


def _first(path: str, key: str) -> str:
    """Value behind the first line of `path` that begins with `key`."""
    try:
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown"


def machine() -> Dict[str, str]:
    """The machine, without its name."""
    memory = _first("/proc/meminfo", "MemTotal").split()[0]
    return {"processor": _first("/proc/cpuinfo", "model name"), "cores": str(cores()),
            "memory": f"{int(memory) * 1024 / 1e9:.0f} GB" if memory.isdigit() else memory,
            "system": f"{platform.system()} {platform.machine()}"}


def versions() -> str:
    """Python and the packages that matter."""
    found = [f"Python {platform.python_version()}"]
    for name in ("mindspore", "mindformers", "torch", "numpy", "sentencepiece", "safetensors"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def step_text(name: str, result: Dict[str, Any]) -> str:
    """One benchmark's table, or its error as the only line of it."""
    rows = result.get("rows") or [[f"FAILED: {result.get('error', 'no figures')}".replace("|", "/"), "-", "-", "-"]]
    return table(HEADS[name], rows)


def page(results: Dict[str, Any], described: Dict[str, str]) -> str:
    """The whole page. results: benchmark -> what run_all.run_step gives; one that is missing is shown as not run."""
    parts = ["""# Benchmarks

Written by `python benchmarks/run_all.py --write docs/benchmarks.md`; do not edit it by hand. Everything measured was
measured on a CPU. **Nothing here was measured on an NPU**; what others published for Ascend is at the end. A figure is
the median of several runs, and stands beside a limit that was measured in the same run, so that machines compare.

| machine | |
| --- | --- |
""" + "\n".join(f"| {key} | {value} |" for key, value in described.items())]
    if any(result.get("quick") for result in results.values()):
        parts.append("**A quick run with tiny sizes: its figures mean nothing.**")
    for name in HEADS:
        result = results.get(name, {"title": name.capitalize(), "error": "not run"})
        facts = [f"`{result['command']}`" if "command" in result else "", _TARGETS.get(name, ""),
                 result.get("note", ""),
                 f"{result['date']}, {result['seconds']} s in all"
                 + (f", load {result['load']} at the start" if result.get("load") else "")
                 + f"; {result['versions']}." if "seconds" in result else "",
                 f"Other programs used {result['busy']} processors just before or after; do not rely on the figures."
                 if (result.get("busy") or 0) >= 0.3 else ""]
        parts.append("\n\n".join([f"## {result['title']}", *filter(None, facts), step_text(name, result)]))
    return "\n\n".join([*parts, published_section()])

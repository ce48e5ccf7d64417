"""How benchmark results are shown: lines of each benchmark's table, and the whole of docs/benchmarks.md.

Nothing is measured here; run_all.py does, published.py has what others measured.
"""
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from published import published_section

from research.telechat.common.environment import cores

NOT_RUN = "not run"
# Heads of the tables: what is measured, its figure, the limit measured in the same run, how they compare.
HEADS = {
    "preprocessing": ["data", "the command (median)", "limit: the bare tokenizer, one thread", "times the limit"],
    "conversion": ["checkpoint", "the command (median), peak memory",
                   "cp and sync (median); cp alone; limit: SHA-256 by one thread", "times cp and sync"],
    "training": ["one step", "time (median)", "limit: best matrix product", "share of the limit"],
    "compile": ["layers", "until the end of the first step", "reference: the smallest number of layers",
                "times the reference"],
    "by_layer": ["model", "further steps (median), first step", "memory", "time of a whole step"],
    "loss": ["step", "time (median)", "memory", "memory of the first line"],
    "master_weights": ["weights kept as", "share of the exact distance (relative error)",
                       "limit: AdamW in float64", "decrease of the loss, relative to float32"],
    "generation": ["sequences at once", "decoding (median), first token", "limit: reading weights and cache",
                   "share of the limit"],
    "large_generation": ["sequences at once", "decoding (median), first token", "limit: reading weights and cache",
                         "share of the limit"],
    "beside_llama": ["what", "this project (median)", "LlamaForCausalLM (median)", "times as fast (lowest, highest)"],
    "beside_vllm": ["what", "this project (median)", "vLLM (median)", "times as fast (lowest, highest)"],
    "serving": ["requests", "tokens/s, first token (median)", "between tokens: median, 99th percentile",
                "tokens/s, times one by one"],
    "streams": ["rounds of", "read to the end, dropped by the client", "lost; blocks of the cache not freed",
                "memory after the second round, at the end"],
    "planner": ["quantity", "compiled", "reference: the planner's arithmetic", "planner against compiled"],
}
_TARGETS = {"preprocessing": "Target: at most 1.3 times.",
            "conversion": "Target: at most 1.5 times cp and sync, of .bin 2, and at most 1.5 GB of memory above the "
            "largest tensor. The command, too, waits until its files are on disk.",
            "compile": "Target: 64 layers in at most 3 times the time of 8.",
            "beside_llama": "Target: 1.3 times in decoding, 1.2 in reading prompts and in training; decoding of 16 "
            "sequences grows by at most 10 % over 256 tokens.",
            "beside_vllm": "Target: 1.1 times in decoding, 1.0 in reading prompts.",
            "large_generation": "Target: 60 % of the limit.", "streams": "Target: no answer lost, no block leaked."}


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
             f"{row['largest_tensor_gigabytes']:.2f} GB)", f"{row['copy_to_disk_seconds']:.2f} s; "
             f"{row['copy_seconds']:.2f} s; {row['hash_seconds']:.2f} s",
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


def beside_llama_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of beside_llama.py."""
    rows = []
    for row in figures["rows"]:
        times = f"{row['ratio']:.2f} ({row['lowest_ratio']:.2f}, {row['highest_ratio']:.2f})"
        if row["task"] == "decode":
            what = f"decoding, {row['batch']} at once, {row['new']} tokens"
            sides = [f"{row[side]:,.0f} tokens/s, last quarter {row[growth]:.2f} times as slow as the first"
                     for side, growth in (("ours", "growth"), ("theirs", "growth_of_theirs"))]
        else:
            names = {"prefill": "first token of a prompt", "train": "training step"}
            what = f"{names[row['task']]}, {row['batch']} x {row['prompt']:,} tokens"
            sides = [f"{row[side] * 1e3:.0f} ms" for side in ("ours", "theirs")]
        rows.append([what, *sides, times])
    return rows


def serving_rows(figures: Any) -> List[List[str]]:
    """Lines of the output of serve.py."""
    results = figures["results"]
    return [[row["name"], f"{row['tokens_per_second']:,.0f}, {row['first_token_median'] * 1e3:.0f} ms",
             f"{row['between_median'] * 1e3:.1f} ms, {row['between_p99'] * 1e3:.1f} ms",
             f"{row['tokens_per_second'] / results[0]['tokens_per_second']:.2f}"] for row in results]


def streams_rows(figures: Any) -> List[List[str]]:
    """The line of the output of serve_streams.py."""
    rows = figures["rows"]
    read, left, lost = (sum(row[key] for row in rows) for key in ("read", "left", "lost"))
    memory = [f"{row['megabytes']:,} MB" for row in (rows[:2][-1], rows[-1]) if "megabytes" in row]
    return [[f"{figures['streams']} streams, {len(rows)} rounds", f"{read:,}, {left:,}",
             f"{lost}, {rows[-1]['blocks']:g}", ", ".join(memory) or "-"]]


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
    """One benchmark's table; its error, or that it has not been run, as the only line of it."""
    fault = "not measured yet" if result.get("error") == NOT_RUN else f"FAILED: {result.get('error', 'no figures')}"
    rows = result.get("rows") or [[fault.replace("|", "/"), "-", "-", "-"]]
    return table(HEADS[name], rows)


def page(results: Dict[str, Any], described: Dict[str, str], titles: Mapping[str, str] = MappingProxyType({}),
         commands: Mapping[str, str] = MappingProxyType({})) -> str:
    """The whole page. results: benchmark -> what run_all.run_step gives; one that is missing is shown as not measured,
    with its title and command."""
    parts = ["""# Benchmarks

Written by `python benchmarks/run_all.py --write docs/benchmarks.md`; do not edit it by hand. Everything measured was
measured on a CPU. **Nothing here was measured on an NPU**; what others published for Ascend is at the end. A figure is
the median of several runs, and is shown with a limit measured in the same run, so that machines can be compared.

| machine | |
| --- | --- |
""" + "\n".join(f"| {key} | {value} |" for key, value in described.items())]
    if any(result.get("quick") for result in results.values()):
        parts.append("**A quick run with tiny sizes: its figures mean nothing.**")
    for name in HEADS:
        result = results.get(name) or {"title": titles.get(name, name.capitalize()), "error": NOT_RUN,
                                       **({"command": commands[name]} if name in commands else {})}
        facts = [f"`{result['command']}`" if "command" in result else "", _TARGETS.get(name, ""),
                 result.get("note", ""),
                 f"{result['date']}, {result['seconds']} s in all"
                 + (f", load {result['load']} at the start" if result.get("load") else "")
                 + f"; {result['versions']}." if "seconds" in result else "",
                 f"Other programs used {result['busy']} processors just before or after; do not rely on the figures."
                 if (result.get("busy") or 0) >= 0.3 else ""]
        parts.append("\n\n".join([f"## {result['title']}", *filter(None, facts), step_text(name, result)]))
    return "\n\n".join([*parts, published_section()])

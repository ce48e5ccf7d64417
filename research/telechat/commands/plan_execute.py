"""`plan --execute`: compiles a small model of a plan for all ranks and compares what it computes with one rank."""
import argparse
from typing import Callable, Dict, List

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.common.table import table
from research.telechat.interpret import attention, cpu_step, prediction, training
from research.telechat.interpret.graphs import Compiled, compiled
from research.telechat.interpret.operators import OPERATORS
from research.telechat.interpret.shrink import Sizes, shrink, uncut
from research.telechat.interpret.weights import differences, random_weights
from research.telechat.plan.plan import Plan, read_plan

MOST_RANKS = 8                               # where --ranks is not given
_SHOWN = 5                                   # parameters with the largest differences


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that belong to --execute."""
    add = parser.add_argument
    add("--execute", action="store_true",
        help="compile a small model of this plan for all ranks, execute it in float64, and compare the result "
             "with one rank; degrees are halved down to --ranks")
    add("--steps", type=int, default=2, help="with --execute: training steps")
    add("--sizes", nargs="+", default=[], metavar="KEY=VALUE",
        help="with --execute: sizes of the small model to override, e.g. num_layers=4 seq_length=64")
    add("--jobs", type=int, default=1, help="with --execute: ranks compiled in parallel (a core and 1.5 GB each)")
    add("--declared_types", action="store_true",
        help="with --execute: compute in the types of the graph as well, and compare the rounding")
    add("--cpu", action="store_true",
        help="with --execute: compare the unsharded graph with a real step on the CPU as well")


def read_sizes(words: List[str]) -> Sizes:
    """'num_layers=4' -> {'num_layers': 4}. Raises ConfigError."""
    sizes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value.isdigit() or int(value) < 1:
            raise ConfigError(f"--sizes {word}: expected KEY=NUMBER, e.g. num_layers=4")
        sizes[key] = int(value)
    return sizes


def _degrees(plan: Plan) -> str:
    return f"data {plan.dp} x model {plan.mp} x pipeline {plan.pp} x context {plan.cp}"


def _compile(recipe: JsonObject, args: argparse.Namespace, what: str) -> Compiled:
    from tqdm import tqdm
    with tqdm(total=read_plan(recipe).ranks, desc=f"compiling {what}", unit="rank", disable=None, leave=False) as bar:
        return compiled(recipe, args.jobs, args.timeout, progress=bar.update)


def _show(rows: Dict[str, float]) -> str:
    worst = sorted(rows.items(), key=lambda one: -one[1])[:_SHOWN]
    return table([["difference", "of"], *([f"{gap:.1e}", name] for name, gap in worst)])


def _training(plan: Compiled, whole: Compiled, args: argparse.Namespace) -> JsonObject:
    result = training.compare(plan, whole, args.steps)
    for step, (loss, norm) in enumerate(zip(result.losses, result.norms)):
        print(f"step {step}: loss {loss:.12f}, norm of the gradients {norm:.12f}")
    print(f"largest difference from one rank: loss and norm {result.loss_gap:.1e}; of {len(result.differences)} "
          "parameters and moments, as a share of the largest change:")
    print(_show(result.differences))
    print(f"tokens after a label change its loss by {result.leak:.1e}")
    model = plan.plan.model
    if model.use_ring_attention and plan.plan.cp > plan.plan.ulysses:
        other = training.compare(plan, whole, args.steps, operators={**OPERATORS, **attention.operators(True)})
        print("ring attention asks the kernel for a zero-width band; read as documented, as the diagonal, the plan "
              f"differs by {result.worst:.1e}, read as empty by {other.worst:.1e}; only a device can tell "
              "(docs/parallel.md)")
    if result.stale:
        print(f"a later pipeline stage keeps an older copy of {', '.join(result.stale[:3])}; merging takes the first's")
    return result.as_json()


def _prediction(plan: Compiled, whole: Compiled, args: argparse.Namespace) -> JsonObject:
    result = prediction.compare(plan, whole, args.steps + 1)
    for step, gap in enumerate(result.steps):
        print(f"{'decoding ' + str(step) if step else 'prompt'}: logits differ from those of one rank by {gap:.1e}")
    print(f"decoding differs from one pass over prompt and answer by {result.again:.1e}")
    return result.as_json()


def _real_step(whole: Compiled, args: argparse.Namespace) -> JsonObject:
    """The unsharded graph against the real model on the CPU."""
    weights = random_weights(whole.programs[0]["step"])
    batches = [training.make_batch(whole, 1 + step) for step in range(args.steps)]
    expected = training.execute(whole, weights, batches)
    losses, found = cpu_step.real_steps(whole.recipe, weights, batches)
    gaps = differences(found, expected.weights, weights)
    gap = max(abs(one - other) / other for one, other in zip(losses, expected.losses))
    worst = max(gaps.values())
    print(f"a real float32 step on the CPU: loss differs by {gap:.1e}, parameters and moments by {worst:.1e} of the "
          "largest change")
    fault = "" if max(gap, worst) <= cpu_step.LIMIT else (
        f"the graph computes something other than the model on the CPU: {max(gaps, key=lambda name: gaps[name])} "
        f"differs by {worst:.1e}, the loss by {gap:.1e} (limit {cpu_step.LIMIT:.0e})")
    return {"loss": gap, "differences": gaps, "fault": fault}


def execute_plan(recipe: JsonObject, args: argparse.Namespace) -> JsonObject:
    """Print what executing shows; returns it for a file, with "fault": '' where all is well. Raises UserError."""
    if args.steps < 1 or args.jobs < 1:
        raise ConfigError("--steps and --jobs: expected at least 1")
    if read_plan(recipe).device == "CPU":
        raise ConfigError("--execute: context.device_target is CPU; graphs are compiled for Ascend, use its recipe")
    ranks = args.ranks or min(read_plan(recipe).ranks, MOST_RANKS)
    small = shrink(recipe, ranks, read_sizes(args.sizes))
    plan = read_plan(small)
    model = plan.model
    print(f"{ranks} ranks, {_degrees(plan)}; {model.num_layers} layers of width {model.hidden_size}, {model.num_heads} "
          f"heads, {model.seq_length} tokens")
    whole = _compile(uncut(small), args, "the unsharded model")
    cut = _compile(small, args, "the plan")
    print(f"compiled in {whole.seconds + cut.seconds:.0f} s of the compiler; graphs are kept")
    compare: Callable[..., JsonObject] = _training if plan.training else _prediction
    result: JsonObject = {"ranks": ranks, "plan": _degrees(plan), **compare(cut, whole, args)}
    faults = [result["fault"]]
    if args.cpu and plan.training:
        result["cpu"] = _real_step(whole, args)
        faults.append(result["cpu"]["fault"])
    if args.declared_types and plan.training:
        rounded = training.rounding(cut, whole, args.steps)
        print(f"in the declared types: loss and norm differ by {rounded.of_types:.1e} from float64, and by "
              f"{rounded.between_plans:.1e} between the plan and one rank")
        result["rounding"] = rounded._asdict()
        faults.append(rounded.fault())
    result["fault"] = "; ".join(filter(None, faults))
    print(f"error: {result['fault']}" if result["fault"] else "the plan computes what one rank computes")
    return result

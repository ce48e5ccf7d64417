"""Write the tables of the time model into docs/parallel.md: what it says of published speeds, and of our recipes.

    python scripts/time_table.py           # print them
    python scripts/time_table.py --write   # write them into docs/parallel.md
    python scripts/time_table.py --check   # exit code 1 if the document is not current

Published speeds are those of plan/calibration.py; every time is an estimate, and nothing was measured.
"""
import math
import sys
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from research.telechat.plan.calibration import POINTS, Prepared, fit, leave_one_out, one_share
from research.telechat.plan.timing import REACHED
from scripts import generated

DOCUMENT = ROOT / "docs/parallel.md"
HEAD = ["published", "tokens/s", "estimated", "off by", "off by, left out", "one MFU for all", "largest parts"]


def _percent(error: float) -> str:
    return f"{error:+.0%}"


def table() -> str:
    """Estimates compared with published speeds, as Markdown."""
    points = [Prepared(point) for point in POINTS]
    without, constant = leave_one_out(points), one_share(points)
    rows: List[List[str]] = [HEAD, ["---"] * len(HEAD)]
    for point in points:
        name, time = point.point.name, point.time(REACHED)
        error = math.expm1(point.error(REACHED))
        largest = sorted(time.parts, key=lambda part: -time.parts[part])[:3]
        rows.append([name, f"{point.point.tokens_per_second:g}", f"{point.point.tokens_per_second * (1 + error):,.1f}",
                     _percent(error), _percent(without[name]), _percent(constant[name]) if name in constant else "",
                     ", ".join(f"{part} {time.parts[part] / time.seconds:.0%}" for part in largest)])
    found = fit(points)
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "",
                      f"Constants: {found.matrix:.0%} of 313 TFLOP/s in matrix products, {found.attention:.0%} in "
                      f"flash attention, {found.memory:.0%} of 1.6 TB/s memory bandwidth, {found.links:.0%} of the "
                      "links (28 GB/s between two cards of a machine, 25 GB/s of a network port), "
                      f"{found.latency * 1e6:.0f} µs for each collective and each pass of a layer."])


if __name__ == "__main__":
    sys.exit(generated.run("time_table.py", DOCUMENT, table, "the tables of the time model"))

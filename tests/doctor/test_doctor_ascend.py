"""What `telechat doctor` asks Ascend's kernels, compiled for Ascend by the simulated runtime and executed in NumPy: an
error in a cell that only an NPU compiles shows here first."""
import json
import re
from pathlib import Path

import prepared
import pytest
from doctor_fixtures import NumpyDevice

from research.telechat.ascend_sim import runtime
from research.telechat.doctor import attention_checks, cache_checks, kernel_checks

ROOT = Path(__file__).resolve().parents[2]
FUSED = {"FlashAttentionScore", "FlashAttentionScoreGrad", "RmsNorm", "RmsNormGrad", "PagedAttention",
         "ReshapeAndCache", "DropoutGenMask", "NPUGetFloatStatusV2"}
ROUNDING = 1e-6                              # results are returned in float32


@pytest.mark.slow
@pytest.mark.usefixtures("ascend_plugin")
def test_every_kernel_compiles_for_ascend_and_agrees_with_numpy(tmp_path):
    result = tmp_path / "result.json"
    done = prepared.run([ROOT / "tests/support/ascend_driver.py", result], env=runtime.environment(), ascend=True)
    assert done.returncode == 0, done.stderr[-2000:]
    given = json.loads(result.read_text())
    sizes, dtypes = attention_checks.Sizes(), NumpyDevice.dtypes
    checks = [*kernel_checks.checks(dtypes), *attention_checks.checks(dtypes, sizes),
              *cache_checks.checks(dtypes, sizes.dim)]
    assert {finding["name"] for finding in given["findings"]} == {check.name for check in checks}
    for finding in given["findings"]:
        assert finding["verdict"] == "ok", finding
        differs = re.findall(r"differs by (\S+?),?(?:$| )", finding["found"])
        assert all(float(gap) < ROUNDING for gap in differs), finding
    assert not FUSED - set(given["executed"])
    assert given["band"]["verdict"] == "wrong" and given["band"]["found"] == "the diagonal"

"""Promise: the package and its command line import nothing of an extra, whose imports take seconds."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, longtail, longtail.training, longtail.integrations.timm, longtail.__main__ as command
assert {"LongTailAccuracy", "LongTailMeanAveragePrecision"} < set(longtail.training.__all__)
command.make_parser()
extras = {"rich", "sklearn", "scipy", "matplotlib", "torchmetrics"}
extras |= {"transformers", "lightning", "pytorch_lightning", "accelerate", "trl", "timm"}
print(sorted(extras & set(sys.modules)))
"""


def test_no_extra_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

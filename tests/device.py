"""Where the suites' engines compute: `TEST_DEVICE=cuda scripts/test tests/conformance` has them on a GPU."""

import os

DEVICE = os.environ.get("TEST_DEVICE", "cpu")

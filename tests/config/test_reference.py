"""The generated page docs/config.md."""

import subprocess
import sys

from launched import CHECKOUT

from ddp_cifar.config import fields


def test_the_config_reference_matches_the_schema() -> None:
    page = (CHECKOUT / "docs" / "config.md").read_text()
    command = [
        sys.executable,
        "-m",
        "ddp_cifar.config.reference",
    ]  # here, the tests have registered a model of their own
    generated = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert page == generated, "run: python -m ddp_cifar.config.reference > docs/config.md"
    assert all(f"`{setting.key}`" in page for setting in fields())

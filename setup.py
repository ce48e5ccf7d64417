"""What setup.cfg cannot say: the bases of the recipes, configs/telechat, become the package research.telechat.base.

The package `research` itself is left out: its __init__.py in an installed wheel would hide the plugins of a checkout.
"""
from setuptools import find_packages, setup

packages = [f"research.{name}" for name in find_packages("research", include=["telechat", "telechat.*"])]
setup(packages=[*packages, "research.telechat.base"], package_dir={"research.telechat.base": "configs/telechat"})

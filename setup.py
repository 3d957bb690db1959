"""Computes the list of packages, so that no sub-package can be forgotten. All else is in setup.cfg."""

import configparser
import sys

from setuptools import find_packages, setup

if "develop" in sys.argv:
    # Legacy develop links only ./diffdistill and leaves out the mapped folders without a word.
    sys.exit("setup.py develop would install half a package: use `pip install -e .`")

cfg = configparser.ConfigParser()
cfg.read("setup.cfg", encoding="utf-8")
mapped = [line.split(" = ") for line in cfg["options"]["package_dir"].strip().splitlines()]

packages = find_packages(include=["diffdistill", "diffdistill.*"])
for package, folder in mapped:
    packages += [package, *(f"{package}.{sub}" for sub in find_packages(folder))]

setup(packages=packages)

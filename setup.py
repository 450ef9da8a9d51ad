"""Everything static is in pyproject.toml. This file finds the two package roots."""

import os

from setuptools import find_packages, setup

if os.environ.get("LORAPAR_CUDA", "0") == "1":
    raise SystemExit(
        "LORAPAR_CUDA=1 asks for the CUDA extension, but this version has no sources in csrc/; "
        "leave LORAPAR_CUDA unset."
    )

setup(
    packages=[*find_packages(include=["lorapar_kernels*"]), *find_packages("python")],
    package_dir={"lorapar": "python/lorapar"},
    package_data={
        "lorapar": ["prompts/*.txt", "templates/*.j2"],
        "lorapar_kernels": ["tuned/*.json"],
    },
)

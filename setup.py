"""What pyproject.toml cannot express: ``kernels/`` at the top is the package ``newllm.kernels``.

The folder has no ``__init__.py`` (CONTRIBUTING.md says why), so no package finder lists it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["newllm", "newllm.*"]), "newllm.kernels"],
    package_dir={"newllm.kernels": "kernels"},
    package_data={"newllm": ["py.typed", "configs/*.yaml"]},
)

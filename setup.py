"""What pyproject.toml cannot express: where ``kernels/`` goes, and the native extension ``newllm._C``.

``kernels/`` at the top is the package ``newllm.kernels``; it has no ``__init__.py`` (CONTRIBUTING.md says
why), so no package finder lists it. The extension is built by ``csrc/build.py``; the installation is pure
Python where there is no compiler.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildNative(build_ext):
    """Hands the extension over to ``csrc/build.py``."""

    def build_extension(self, ext: Extension) -> None:
        """Build it to where setuptools expects it, or leave it out."""
        spec = importlib.util.spec_from_file_location("newllm_csrc_build", ROOT / "csrc" / "build.py")
        assert spec is not None and spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        native.build(ROOT / "csrc", Path(self.build_temp), Path(self.get_ext_fullpath(ext.name)))

    def get_outputs(self) -> list[str]:
        """Only what was built: an extension that was left out is no output."""
        return [name for name in super().get_outputs() if Path(name).exists()]


setup(
    packages=[*find_packages(include=["newllm", "newllm.*"]), "newllm.kernels"],
    package_dir={"newllm.kernels": "kernels"},
    package_data={"newllm": ["py.typed", "configs/*.yaml", "serving/*.html"]},
    # Optional: what was left out for want of a compiler is not looked for. Other failures are no such errors.
    ext_modules=[Extension("newllm._C", [], optional=True)],
    cmdclass={"build_ext": BuildNative},
)

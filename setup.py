"""Builds the optional C extension; all else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_ext import build_ext


class OptionalExtension(build_ext):
    """Builds `viommu._hot`, and goes on without it where no compiler works.

    The same functions exist in Python; only speed is lost.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        for extension in self.extensions:
            extension.optional = True


setup(
    cmdclass={"build_ext": OptionalExtension},
    cffi_modules=["backend/viommu/hot_build.py:ffibuilder"],
)

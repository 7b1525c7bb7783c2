"""The `viommu` command. Here are words, tables and exit codes; what is done is done elsewhere."""

from viommu.cli.main import app

__all__ = ["app"]

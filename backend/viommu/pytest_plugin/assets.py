"""What guests are made of, provided when the first test needs it."""

import sys

import pytest

from viommu.lab.assets import Assets, AssetsMissing, cache_directory
from viommu.lab.provision.__main__ import provision
from viommu.lab.provision.cache import Cache
from viommu.lab.provision.guest_image import ON_DEMAND


def provided(config: pytest.Config, image: str) -> Assets:
    """The assets, with the guest `image` of `viommu setup --guest` if one is named.

    What is missing is provided: about 190 MB, once, by one worker while the others wait. Raises
    `viommu.lab.errors.LabError`.
    """
    try:
        return _loaded(image)
    except AssetsMissing:
        pass
    further = [guest.name for guest in ON_DEMAND if guest.name == image]
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        provision(Cache(cache_directory()), lambda text: print(text, file=sys.stderr), further)  # noqa: T201
    return _loaded(image)


def _loaded(image: str) -> Assets:
    assets = Assets.load()
    if image:
        assets.guest_for(image)
    return assets

"""Provides what the lab runs with: libvfio-user, QEMU, guest kernels and their userland.

Each part is a module with `key()` and `provide()`; `python -m viommu.lab.provision` puts them into
the cache. Never imported by a model.
"""

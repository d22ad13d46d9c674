"""Adapters to training frameworks, imported by name: ``longtail.integrations.transformers``, ``.trl``, ``.lightning``.

What they need is in the extras ``transformers``, ``trl`` and ``lightning``: in a checkout
``pip install --no-build-isolation ".[lightning]"``.
"""

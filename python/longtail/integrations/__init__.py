"""Adapters to training frameworks, imported by name: ``longtail.integrations.transformers`` and ``.lightning``.

What they need is in the extras ``transformers`` and ``lightning``: in a checkout
``pip install --no-build-isolation ".[lightning]"``.
"""

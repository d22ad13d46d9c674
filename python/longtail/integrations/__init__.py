"""Adapters to frameworks, imported by name: ``longtail.integrations.transformers``, ``trl``, ``lightning``, ``timm``.

What they need is in the extras ``transformers``, ``trl``, ``lightning`` and ``timm``: in a checkout
``pip install --no-build-isolation ".[lightning]"``.
"""
